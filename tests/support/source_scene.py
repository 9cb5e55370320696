"""Inputs of loss terms that are limited to a source, with random contents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from loss_scene import Matrix, Result

from megakd.config.terms import Shape
from megakd.data.batch import IGNORE, Batch, Counts, Knowledge, LossInputs, TopK, count_units
from megakd.losses.bundle import unit_scales
from megakd.losses.objective import Objective, build_objective

ROWS, LENGTH, WIDTHS, VOCABULARY = 4, 6, (8, 12), 11


class Texts:
    """Four texts of a language model, of the data or generated."""

    def __init__(self, *, rollouts: bool = False) -> None:
        made, self.rollouts = torch.Generator().manual_seed(3), rollouts
        self.valid = torch.arange(LENGTH) < torch.tensor([6, 4, 6, 0])[:, None]
        labels = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=made)
        self.labels = labels.masked_fill(~self.valid, IGNORE)
        self.labels[0, 1] = IGNORE
        ours, theirs = WIDTHS
        self.hidden = torch.randn(ROWS, LENGTH, ours, generator=made)
        self.head = torch.randn(VOCABULARY, ours, generator=made)
        self.taught = torch.randn(ROWS, LENGTH, theirs, generator=made)
        self.teacher_head = torch.randn(VOCABULARY, theirs, generator=made)

    def batch(self, rows: slice = slice(None)) -> Batch:
        return Batch({}, self.labels[rows], self.valid[rows], is_rollout=self.rollouts)

    def counts(self, objective: Objective) -> Counts:
        return count_units([self.batch()], objective.counters)

    def top_k(self, count: int = 4) -> TopK:
        logprobs = (self.taught @ self.teacher_head.T).log_softmax(-1)
        best, ids = logprobs.topk(count, dim=-1)
        return TopK(ids.int(), best)


def head_of(weight: torch.Tensor) -> Any:
    return Matrix(weight)


def objective_of(terms: Sequence[Any]) -> Objective:
    shapes = [Shape(1, width, VOCABULARY) for width in WIDTHS]
    return build_objective(terms, "causal_lm", *shapes)


def result(
    texts: Texts,
    terms: Sequence[Any],
    *,
    rows: slice = slice(None),
    counts: Counts | None = None,
    batch: Batch | None = None,
    taught: Knowledge | None = None,
) -> Result:
    """Total, sums and gradients of some rows, divided by `counts` or by the rows' own."""
    objective = objective_of(terms)
    batch = texts.batch(rows) if batch is None else batch
    hidden, head = (t.detach().clone().requires_grad_() for t in (texts.hidden[rows], texts.head))
    answers, answer = hidden, texts.taught[rows]
    if batch.targets is not None:
        answers, answer = (t.flatten(0, 1)[batch.targets] for t in (answers, answer))
    answered = Knowledge(hidden=answer, head=head_of(texts.teacher_head))
    student = Knowledge(hidden=answers, head=head_of(head))
    counts = count_units([batch], objective.counters) if counts is None else counts
    reading = LossInputs(
        student=student,
        teacher=(taught or answered) if any(term.needs_teacher for term in terms) else None,
        batch=batch,
        weights=objective.weights,
        per_unit=unit_scales(counts, 1).weights,
    )
    ((total, sums),) = objective([reading])
    total.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return Result(total.detach(), sums, {"hidden": hidden.grad, "head": head.grad})
