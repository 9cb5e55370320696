"""Errors of loss and gradients against fp64, over a few rows of the case and all of its ids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench import eager
from bench.problem import Loss, Problem, drop_gradients, run

ROWS = {"cpu": 64, "cuda": 256}
_POISONED_NUMBERS = 1 << 28


class Outcome(NamedTuple):
    """A loss and the gradients of the problem's leaves."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


class Errors(NamedTuple):
    """Norm of the difference over the norm of the truth; None where there is no such thing."""

    loss: float | None
    dx: float | None
    dw: float | None


NO_ERRORS = Errors(None, None, None)


class Truth:
    """The last rows of a problem and their fp64 solution, from the very same rounded inputs."""

    def __init__(self, problem: Problem) -> None:
        self._whole = problem
        self._part = problem.cut(ROWS[problem.student.device.type])
        self._expected = _solve(eager.load(problem.case), self._part.to(torch.float64))

    def errors(self, loss: Loss, *, whole_only: bool = False) -> Errors:
        """Return the gradient of these rows in the whole problem, by another implementation.

        The loss itself and the weight's gradient are sums over rows, so that they come from
        these rows alone; so does a relation's gradient, which depends on all rows.
        `whole_only` leaves those out, for what would compile again for a new shape.
        """
        _poison(self._part.student.device)
        whole = _solve(loss, self._whole)
        expected_x, expected_w = [*self._expected.gradients, None, None][:2]
        is_sum = self._whole.case.kind == "relation"
        dx = None
        if not is_sum and expected_x is not None:
            rows = self._part.case.n
            got_x = whole.gradients[0][-rows:] * (self._whole.case.n / rows)
            dx = _distance(got_x, expected_x)
        if whole_only:
            return Errors(None, dx, None)
        part = _solve(loss, self._part)
        if is_sum and expected_x is not None:
            dx = _distance(part.gradients[0], expected_x)
        dw = None if expected_w is None else _distance(part.gradients[1], expected_w)
        return Errors(_distance(part.loss, self._expected.loss), dx, dw)


def _solve(loss: Loss, problem: Problem) -> Outcome:
    drop_gradients(problem)
    value = run(loss, problem)
    gradients = tuple(_gradient(leaf) for leaf in problem.leaves)
    drop_gradients(problem)
    return Outcome(value, gradients)


def _gradient(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        raise RuntimeError(f"the backward left no gradient in a tensor {list(leaf.shape)}")
    return leaf.grad


def _distance(got: Tensor, expected: Tensor) -> float:
    difference = (got.double() - expected).norm()
    return (difference / expected.norm()).item()


def _poison(device: torch.device) -> None:
    """Leave NaN in free memory of the GPU, so that unwritten outputs show."""
    if device.type == "cuda":
        torch.full((_POISONED_NUMBERS,), float("nan"), device=device)
