"""HomoDistil on gloo ranks: whole runs, with every selection of units noted."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from cases import joined_shards, lab_of
from safetensors.torch import load_file
from transformers import PreTrainedModel

from megakd.engine.sharding import full_shape
from megakd.methods import run_method
from megakd.methods.homodistil import strategy as pruning


def prune(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return the weights, every selection, and the held-out losses by step."""
    notes: list[dict[str, Any]] = []
    sensitivities: list[dict] = []
    select, update = pruning.select, pruning.PruningStrategy.before_update

    def selecting(scores, kept, wanted, student, *, monotone):
        chosen = select(scores, kept, wanted, student, monotone=monotone)
        units = {group: list(places) for group, places in chosen.items()}
        notes.append({"scores": scores.clone(), "kept": units, "wanted": wanted})
        return chosen

    def updating(self, step, student):
        if len(sensitivities) < 2:
            sensitivities.append(whole_sensitivities(student))
        update(self, step, student)

    with (
        patch.object(pruning, "select", selecting),
        patch.object(pruning.PruningStrategy, "before_update", updating),
        lab_of(config_path, overrides, writes=True) as lab,
    ):
        result = run_method(lab.config.method, lab)
    return {
        "state": load_file(result.folder / "model.safetensors"),
        "notes": notes,
        "sensitivities": sensitivities,
        "stages": [result.name for result in lab.results],
        "logged": logged(lab.config.output_dir),
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
    before = models_in_memory()
    with lab_of(config_path, writes=True) as lab:
        run_method(lab.config.method, lab)
    del lab
    return models_in_memory() - before


def models_in_memory() -> int:
    gc.collect()
    return sum(isinstance(found, PreTrainedModel) for found in gc.get_objects())
