"""What the gloo ranks run of shrink: a whole run of the method."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from megakd.config.file import load_config
from megakd.engine import distributed
from megakd.inputs.inputs import prepare
from megakd.methods import run_method
from megakd.models.knowledge import Needs
from megakd.models.layers import with_layers
from megakd.run.run_lab import RunLab
from megakd.scoring.scorer import few
from megakd.training.progress import Reporter


def shrink(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return the student's weights, the candidates, and scores of the layers."""
    config = load_config(Path(config_path), overrides)
    reporter = Reporter(config.output_dir, is_main=distributed.ranks().is_main)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    try:
        result = run_method(config.method, lab)
        layers = lab.pruning.layer_scores("teacher")
    finally:
        lab.close()
    gc.collect()
    return {
        "state": load_file(result.folder / "model.safetensors"),
        "candidates": lab.record.candidates,
        "layers": layers,
        "stages": [found.name for found in lab.results],
    }


def layer_losses(config_path: str, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Return the scores of the layers, and the rise of the loss of models without each layer."""
    config = load_config(Path(config_path), overrides)
    reporter = Reporter(config.output_dir, is_main=distributed.ranks().is_main)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    name = lab.teacher()
    scores, source, assembly = lab.pruning.layer_scores(name), lab.model(name), lab.assembly
    rows = few(assembly.prepared.encoded.validation)

    def loss(layers: tuple[int, ...]) -> float:
        fewer = with_layers(source, layers, where="student.layers")
        model = assembly.frozen(fewer, "teacher_zero0", dtype="fp32", needs=Needs())
        try:
            return assembly.scorer().loss(model.predict, rows)
        finally:
            model.destroy()

    numbers = range(1, len(scores) + 1)
    whole = loss(tuple(numbers))
    without = [loss(tuple(n for n in numbers if n != left_out)) for left_out in numbers]
    return list(scores), [found - whole for found in without]
