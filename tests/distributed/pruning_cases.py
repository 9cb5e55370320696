"""What the gloo ranks run of HomoDistil: whole runs, with every selection of units noted."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from cases import joined_shards
from safetensors.torch import load_file

from megakd.config.file import load_config
from megakd.engine import distributed
from megakd.engine.sharding import full_shape
from megakd.inputs.inputs import prepare
from megakd.methods import run_method
from megakd.methods.homodistil import strategy as pruning
from megakd.run.run_lab import RunLab
from megakd.training.progress import Reporter


def prune(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return the weights, every selection, and the held-out losses by step."""
    config = load_config(Path(config_path), overrides)
    reporter = Reporter(config.output_dir, is_main=distributed.ranks().is_main)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    notes: list[dict[str, Any]] = []
    select, update = pruning.select, pruning.PruningStrategy.before_update

    def selecting(scores, kept, wanted, student, *, monotone):
        found = select(scores, kept, wanted, student, monotone=monotone)
        units = {group: list(places) for group, places in found.items()}
        notes.append({"scores": scores.clone(), "kept": units, "wanted": wanted})
        return found

    sensitivities: list[dict] = []

    def updating(self, step, student):
        if len(sensitivities) < 2:
            sensitivities.append(whole_sensitivities(student))
        update(self, step, student)

    pruning.select, pruning.PruningStrategy.before_update = selecting, updating
    try:
        result = run_method(config.method, lab)
    finally:
        pruning.select, pruning.PruningStrategy.before_update = select, update
        lab.close()
    gc.collect()
    return {
        "state": load_file(result.folder / "model.safetensors"),
        "notes": notes,
        "sensitivities": sensitivities,
        "rows": lab.record.pruning,
        "stages": [found.name for found in lab.results],
        "logged": logged(config.output_dir),
    }


def logged(out: Path) -> list[dict]:
    """The lines of metrics.jsonl with training losses."""
    path = out / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line for line in lines if "train/loss" in line]


def whole_sensitivities(student) -> dict[str, torch.Tensor]:
    """|weight * gradient| of every weight, put together of all ranks' shards."""
    joined = joined_shards(student)
    shapes = {name: full_shape(p) for name, p in student.student.named_parameters()}
    return {
        name: (both[0] * both[1]).abs().view(shapes[name]).double() for name, both in joined.items()
    }


def alive_after(config_path: str) -> int:
    """Run the method; return the number of models that are still in memory afterwards."""
    from transformers import PreTrainedModel

    gc.collect()
    before = sum(isinstance(found, PreTrainedModel) for found in gc.get_objects())
    config = load_config(Path(config_path))
    reporter = Reporter(config.output_dir, is_main=distributed.ranks().is_main)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    run_method(config.method, lab)
    lab.close()
    del lab
    gc.collect()
    return sum(isinstance(found, PreTrainedModel) for found in gc.get_objects()) - before
