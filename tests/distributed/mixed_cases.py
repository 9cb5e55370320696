"""What the gloo ranks run of mixed vocabularies: whole runs, with their start and batches noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from megakd.config.file import load_config
from megakd.engine import collectives, distributed
from megakd.engine.sharding import gathered_state
from megakd.inputs.inputs import prepare
from megakd.methods import run_method
from megakd.methods.mixed_vocabulary.parameter_projections import LayerErrors
from megakd.models.second_vocabulary import FILE
from megakd.run.run_lab import RunLab
from megakd.training.assembly import Assembly
from megakd.training.progress import Reporter
from megakd.training.trainer import Trainer


def learn(config_path: str, overrides: list[str]) -> dict[str, Any]:
    """Run the method; return by stage: initial weights, batches, gradients and final weights."""
    config = load_config(Path(config_path), overrides)
    reporter = Reporter(config.output_dir, is_main=distributed.ranks().is_main)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
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
        parts = {name: collectives.all_reduce_(v.clone()) for name, v in report.parts.items()}
        here["parts"].append({name: float(value) for name, value in parts.items()})
        return report

    Assembly.student, Trainer.train_step = building, stepping  # type: ignore[method-assign]
    try:
        run_method(config.method, lab)
        lab.close()
    finally:
        Assembly.student, Trainer.train_step = build, step  # type: ignore[method-assign]
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

    found: list[int] = []
    known: dict[int, LayerErrors] = {}
    forward = LayerErrors.forward

    def comparing(self):
        known[id(self)] = self
        result = forward(self)
        weights = [
            [
                place.module._parameters.get(place.name)
                for pair in layer._compared
                for place in pair[:2]
            ]
            for layer in known.values()
        ]
        is_open = [
            any(getattr(w, "ds_status", None) == ZeroParamStatus.AVAILABLE for w in layer)
            for layer in weights
        ]
        found.append(sum(is_open))
        return result

    LayerErrors.forward = comparing  # type: ignore[method-assign]
    try:
        learn(config_path, overrides)
    finally:
        LayerErrors.forward = forward  # type: ignore[method-assign]
    return found
