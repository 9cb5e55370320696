"""Mixed vocabularies on gloo ranks: whole runs, with their start and batches noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from cases import lab_of, summed
from safetensors.torch import load_file

from megakd.engine.sharding import gathered_state
from megakd.methods import run_method
from megakd.methods.mixed_vocabulary.parameter_projections import LayerErrors
from megakd.models.second_vocabulary import FILE
from megakd.training.assembly import Assembly
from megakd.training.trainer import Trainer


def learn(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return by stage: initial weights, batches, gradients and final weights."""
    notes: dict[str, dict[str, Any]] = {}
    build, step = Assembly.student, Trainer.train_step

    def building(self, stage):
        engine, bundle = build(self, stage)
        notes[stage.name] = {"initial": dict(gathered_state(bundle)), "batches": [], "parts": []}
        return engine, bundle

    def stepping(self, batches):
        here = list(notes.values())[-1]
        here["batches"].append(list(batches))
        report = step(self, batches)
        here["parts"].append(summed(report.parts))
        return report

    with (
        patch.object(Assembly, "student", building),
        patch.object(Trainer, "train_step", stepping),
        lab_of(config_path, overrides, writes=True) as lab,
    ):
        run_method(lab.config.method, lab)
    for result in lab.results:
        notes[result.name]["final"] = folder_weights(result.folder)
    return notes


def folder_weights(folder: Path) -> dict[str, Any]:
    """All weights below a stage's folder, by path."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        prefix = "/".join(
            (*file.relative_to(folder).parts[:-1], file.stem if file.name == FILE else "")
        )
        found |= {
            f"{prefix.strip('/')}/{name}".lstrip("/"): w for name, w in load_file(file).items()
        }
    return found


def open_layers(config_path: str, overrides: list[str]) -> list[int]:
    """Run the method; return how many compared layers are gathered whenever a layer is compared."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    counts: list[int] = []
    known: dict[int, LayerErrors] = {}
    forward = LayerErrors.forward

    def is_gathered(place) -> bool:
        weight = place.module._parameters.get(place.name)
        return getattr(weight, "ds_status", None) == ZeroParamStatus.AVAILABLE

    def comparing(self):
        known[id(self)] = self
        result = forward(self)
        counts.append(
            sum(
                any(is_gathered(place) for pair in layer._compared for place in pair[:2])
                for layer in known.values()
            )
        )
        return result

    with patch.object(LayerErrors, "forward", comparing):
        learn(config_path, overrides)
    return counts
