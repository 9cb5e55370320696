"""What the gloo ranks run for students with adapters: a method to its end, with its files."""

from __future__ import annotations

import gc
from pathlib import Path

from megakd.config.file import load_config
from megakd.engine import distributed
from megakd.inputs.inputs import prepare
from megakd.methods import run_method
from megakd.run.run_lab import RunLab
from megakd.training.progress import Reporter


def finish(config_path: str, overrides: list[str]) -> str:
    """Run the method of a config to its end, from a checkpoint if there is one."""
    config = load_config(Path(config_path), overrides)
    reporter = Reporter(config.output_dir, is_main=False)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    try:
        return str(run_method(config.method, lab).folder)
    finally:
        lab.close()
        gc.collect()
