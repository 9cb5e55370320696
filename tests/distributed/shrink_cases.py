"""Shrink on gloo ranks: a whole run of the method."""

from __future__ import annotations

from typing import Any

from cases import lab_of
from safetensors.torch import load_file

from megakd.methods import run_method
from megakd.models.knowledge import Needs
from megakd.models.layers import with_layers
from megakd.scoring.scorer import few


def shrink(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return the student's weights, the candidates, and scores of the layers."""
    with lab_of(config_path, overrides, writes=True) as lab:
        result = run_method(lab.config.method, lab)
        layers = lab.pruning.layer_scores("teacher")
    return {
        "state": load_file(result.folder / "model.safetensors"),
        "candidates": lab.record.candidates,
        "layers": layers,
    }


def layer_losses(config_path: str, overrides: list[str]) -> tuple[list[float], list[float]]:
    """Return the scores of the layers, and the rise of the loss of models without each layer."""
    with lab_of(config_path, overrides, writes=True) as lab:
        name, assembly = lab.teacher(), lab.assembly
        scores, source = lab.pruning.layer_scores(name), lab.model(name)
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
        return list(scores), [value - whole for value in without]
