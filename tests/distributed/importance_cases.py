"""What the gloo ranks measure of a frozen model's units, and what they hold meanwhile."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

import megakd.pruning.importance
from megakd.config.file import load_config
from megakd.engine import distributed
from megakd.errors import MegakdError
from megakd.inputs.inputs import prepare
from megakd.models.source import ReadyTeacher
from megakd.pruning.importance import Gates
from megakd.training.assembly import Assembly

ROWS_PER_BATCH = 6
"""Of all ranks together."""


def measured(config_path: str, overrides: list[str]) -> dict:
    """Scores of the config's teacher on the validation split."""
    return _measured(config_path, overrides, lambda rows: rows)


def measured_with_width(config_path: str, overrides: list[str]) -> dict:
    """The same, and of the columns of its hidden states."""
    return _measured(config_path, overrides, lambda rows: rows, with_width=True)


def measured_without_labels(config_path: str) -> dict:
    """The same on the rows that carry no label."""
    return _measured(
        config_path, [], lambda rows: rows.select([i for i, y in enumerate(rows["label"]) if y < 0])
    )


def _measured(config_path: str, overrides: list[str], chosen, *, with_width=False) -> dict:
    config = load_config(Path(config_path), overrides)
    prepared = prepare(config)
    assembly = Assembly(config=config, prepared=prepared, ranks=distributed.ranks())
    rows = chosen(prepared.encoded.validation)
    watch = Watch()
    try:
        with watch.watching():
            scores = megakd.pruning.importance.measure_importance(
                assembly,
                ReadyTeacher(prepared.sources["teacher"], config.teacher),
                rows,
                batch_size=ROWS_PER_BATCH,
                with_width=with_width,
            )
    except MegakdError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {**scores._asdict(), **watch.facts()}


class Watch:
    """Looks into the engine that measures."""

    def __init__(self):
        self.module = None
        self.local = 0
        self.used = []
        self.held = []

    def facts(self) -> dict:
        """local: elements of this rank. held: per batch, of how many weights the whole is there."""
        weights = [*self.module.parameters()]
        return {
            "local": self.local,
            "whole": sum(getattr(w, "ds_numel", w.numel()) for w in weights),
            "held": self.held,
            "learning": sum(w.requires_grad for w in weights),
            "gradients": sum(w.grad is not None for w in weights),
        }

    def watching(self):
        """Watches what is measured inside."""
        from contextlib import ExitStack
        from unittest.mock import patch

        stack = ExitStack()
        start, gradients = megakd.pruning.importance.frozen_engine, Gates.gradients

        def engine(module, **options):
            started = start(module, **options)
            self._look_into(module)
            return started

        def at_the_backward(gates, loss):
            self.held.append(sum(not weight.expired() for weight in self.used))
            self.used.clear()
            return gradients(gates, loss)

        # A student at ZeRO 3 may have replaced torch's own function in this process before.
        linear = torch._C._nn.linear
        stack.enter_context(patch.object(torch.nn.functional, "linear", linear))
        stack.enter_context(patch.object(megakd.pruning.importance, "frozen_engine", engine))
        stack.enter_context(patch.object(Gates, "gradients", at_the_backward))
        return stack

    def _look_into(self, module):
        self.module = module
        self.local = sum(getattr(w, "ds_tensor", w).numel() for w in module.parameters())
        for part in module.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_pre_hook(self._note)

    def _note(self, linear, inputs):
        self.used.append(StorageWeakRef(linear.weight.untyped_storage()))
