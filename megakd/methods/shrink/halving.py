"""The passes of a trial: all candidates learn at first, and the better half of them to the end.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), with two rungs. Candidates learn
from the same rows with shared weights, so that their losses on these rows can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from megakd.contract.stage import Pass, StepReport, Strategy
from megakd.engine.collectives import all_reduce_

SHORTEST = 32
"""A trial of fewer steps keeps all candidates."""
FEWEST = 2
"""Candidates of a size that learn to the end, so that held-out rows decide."""


class Halving(Strategy):
    """A strategy in which the worse half of a size's candidates leaves, twice.

    The loss of a step is the mean of the losses of the candidates that learn. After a quarter and
    after half of the steps, the candidates with the highest loss in the steps since the middle of
    the rung leave.

    sizes: names of the candidates of each size.
    term: loss that is compared; None: all candidates stay.
    steps: number of steps of the trial.
    """

    def __init__(
        self, teacher: str, sizes: Sequence[Sequence[str]], term: str | None, steps: int
    ) -> None:
        self._facts = {"teacher": teacher, "sizes": [*map(list, sizes)], "term": term}
        self._teacher, self._term = teacher, term
        chooses = term is not None and steps >= SHORTEST and max(map(len, sizes)) > FEWEST
        self._rungs = (0, steps // 4, steps // 2) if chooses else ()
        self._left = [[*names] for names in sizes]
        self._sums: dict[str, float] = {}

    @property
    def facts(self) -> Mapping[str, Any]:
        return {**self._facts, "rungs": [*self._rungs]}

    def passes(self, step: int) -> tuple[Pass, ...]:
        """Return a pass for each candidate that still learns."""
        del step
        names = [name for size in self._left for name in size]
        scale = 1 / len(names)
        return tuple(Pass(teacher=self._teacher, view=name, scale=scale) for name in names)

    def after_update(self, report: StepReport) -> None:
        """Add up losses in the second half of a rung; let the worse candidates leave at its end."""
        done = report.step + 1
        for before, rung in pairwise(self._rungs):
            if (before + rung) / 2 < done <= rung:
                self._add(report.parts)
            if done == rung:
                self._left = [self._better(names) for names in self._left]
                self._sums = {}

    def _add(self, parts: Mapping[str, Tensor]) -> None:
        names = [name for size in self._left for name in size]
        losses = torch.stack([parts[f"{name}/{self._term}"].float() for name in names])
        for name, loss in zip(names, all_reduce_(losses).tolist(), strict=True):
            self._sums[name] = self._sums.get(name, 0.0) + loss

    def _better(self, names: Sequence[str]) -> list[str]:
        """Return the better half, in the given order; a loss that is not a number is the worst."""
        losses = {n: math.inf if math.isnan(self._sums[n]) else self._sums[n] for n in names}
        count = max(FEWEST, -(-len(names) // 2))
        better = sorted(names, key=losses.__getitem__)[:count]
        return [name for name in names if name in better]

    def state_dict(self) -> dict[str, Any]:
        return {"left": self._left, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._left, self._sums = state["left"], state["sums"]

    def scalars(self) -> Mapping[str, float]:
        return {"candidates": float(sum(map(len, self._left)))}
