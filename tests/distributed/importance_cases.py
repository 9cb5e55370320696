"""Importance of a frozen model's units on gloo ranks, and the memory that it takes."""

from __future__ import annotations

from contextlib import contextmanager
from unittest.mock import patch

import torch
from cases import lab_of
from engine_cases import elements, local
from torch.multiprocessing.reductions import StorageWeakRef

from megakd.errors import MegakdError
from megakd.models.source import ReadyTeacher
from megakd.pruning import importance

ROWS_PER_BATCH = 6
"""Of all ranks together."""


def measured(
    config_path: str, overrides: list[str], *, with_width: bool = False, labelled: bool = True
) -> dict:
    """Scores of the config's teacher on the validation split, or on its rows without a label."""
    with lab_of(config_path, overrides) as lab:
        prepared = lab.assembly.prepared
        rows = prepared.encoded.validation
        if not labelled:
            rows = rows.select([i for i, label in enumerate(rows["label"]) if label < 0])
        try:
            with watching() as facts:
                scores = importance.measure_importance(
                    lab.assembly,
                    ReadyTeacher(prepared.sources["teacher"], lab.config.teacher),
                    rows,
                    batch_size=ROWS_PER_BATCH,
                    with_width=with_width,
                )
        except MegakdError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        module = facts.pop("module")
        weights = [*module.parameters()]
        return {
            **scores._asdict(),
            **facts,
            "learning": sum(w.requires_grad for w in weights),
            "gradients": sum(w.grad is not None for w in weights),
        }


@contextmanager
def watching():
    """The engine's module; this rank's share of it; per batch, how many weights are whole."""
    facts, used = {"held": []}, []
    start, gradients = importance.frozen_engine, importance.Gates.gradients

    def note(module, inputs):
        used.append(StorageWeakRef(module.weight.untyped_storage()))

    def engine(module, **options):
        started = start(module, **options)
        facts["module"] = module
        facts["share"] = sum(local(w).numel() for w in module.parameters()) / elements(module)
        for part in module.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_pre_hook(note)
        return started

    def at_the_backward(gates, loss):
        facts["held"].append(sum(not weight.expired() for weight in used))
        used.clear()
        return gradients(gates, loss)

    with (
        # A student at ZeRO 3 may have replaced torch's own function in this process before.
        patch.object(torch.nn.functional, "linear", torch._C._nn.linear),
        patch.object(importance, "frozen_engine", engine),
        patch.object(importance.Gates, "gradients", at_the_backward),
    ):
        yield facts
