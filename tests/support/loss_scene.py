"""Inputs of loss terms, with random contents, in every form that tests need."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from megakd.config import terms
from megakd.config.terms import HardCrossEntropy, HardMse, Heads, Shape, source_of
from megakd.data.batch import (
    IGNORE,
    AttentionVectors,
    Batch,
    Counts,
    LogitWarp,
    LossInputs,
    Outputs,
    count_units,
)
from megakd.losses.bundle import unit_scales
from megakd.losses.objective import build_objective

HARD = (HardCrossEntropy, HardMse)
LENGTHS = (5, 3, 4, 0)  # the last row only keeps the ranks in step
CLASSES, VOCABULARIES, WIDTHS, LAYERS = 3, (7, 9), (16, 24), (2, 4)
# Two heads of queries, one of keys: 4 divides the width of all vectors.
QUERY_HEADS, KEY_HEADS = 2, 1
PARTS = {"queries": QUERY_HEADS, "keys": KEY_HEADS, "values": KEY_HEADS}
# Packed documents, as a causal LM has them: rows that begin in one, and documents of one token.
POSITIONS = torch.tensor([[0, 1, 0, 1, 2], [3, 4, 0, 1, 2], [0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])


def term_of(loss: str, **options: Any) -> Any:
    """A term by the name that a config gives it."""
    kind = getattr(terms, loss.title().replace("_", ""))
    return kind(loss=loss, **options)


class Matrix:
    """A head whose weights are not sharded."""

    warp = LogitWarp()

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def read(self) -> tuple[torch.Tensor, None]:
        return self.weight, None

    def open(self) -> Any:
        return nullcontext()


class Scene:
    """Inputs of terms, with random contents; `leaves` are the tensors with gradients.

    rollouts: whether the texts are generated; by default as the first term has it.
    """

    def __init__(
        self, task: str, *terms: Any, same_widths: bool = False, rollouts: bool | None = None
    ) -> None:
        torch.manual_seed(1)
        self.task, self.term = task, terms[0]
        is_on_rollouts = source_of(self.term) == "rollouts"
        self.rollouts = is_on_rollouts if rollouts is None else rollouts
        ours, theirs = (WIDTHS[0],) * 2 if same_widths else WIDTHS
        self.objective = build_objective(
            terms,
            task,  # type: ignore[arg-type]
            Shape(LAYERS[0], ours, CLASSES, Heads(QUERY_HEADS, KEY_HEADS, ours // 2)),
            Shape(LAYERS[1], theirs, CLASSES, Heads(QUERY_HEADS, KEY_HEADS, theirs // 2)),
        )
        self.leaves = self.contents(0, ours)
        self.teacher = self.contents(1, theirs)
        self.valid = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
        self.labels = {
            "classification": torch.tensor([1, IGNORE, 0, IGNORE]),
            "regression": torch.tensor([0.5, math.nan, -1.0, math.nan]),
            "causal_lm": torch.randint(VOCABULARIES[0], (4, 5)).masked_fill(~self.valid, IGNORE),
        }[task]
        if task == "causal_lm":
            self.labels[0, 0] = IGNORE

    def contents(self, model: int, width: int) -> dict[str, torch.Tensor]:
        if self.task == "causal_lm":
            outputs = {
                "hidden": torch.randn(4, 5, width),
                "head": torch.randn(VOCABULARIES[model], width),
            }
        else:
            outputs = {"logits": torch.randn(4, CLASSES if self.task == "classification" else 1)}
        states = {f"state{i}": torch.randn(4, 5, width) for i in range(LAYERS[model] + 1)}
        vectors = {
            f"{part}{i}": torch.randn(4, 5, heads * width // 2)
            for i in range(1, LAYERS[model] + 1)
            for part, heads in PARTS.items()
        }
        return outputs | states | vectors

    def equal_to_teacher(self) -> Scene:
        self.leaves |= {name: self.teacher[name].clone() for name in self.leaves}
        self.leaves |= {f"state{s}": self.teacher[f"state{t}"].clone() for s, t in ((1, 2), (2, 4))}
        for part in PARTS:
            self.leaves |= {f"{part}{s}": self.teacher[f"{part}{t}"] for s, t in ((1, 2), (2, 4))}
        return self

    @property
    def of_first(self) -> bool:
        return getattr(self.term, "positions", "all") == "first"

    def converted(self, dtype: torch.dtype) -> Scene:
        self.leaves = {name: value.to(dtype) for name, value in self.leaves.items()}
        self.teacher = {name: value.to(dtype) for name, value in self.teacher.items()}
        return self

    def counting(self, name: str) -> torch.Tensor:
        """Return the places of a tensor that the term may read, by the table of units."""
        if name.startswith(("state", *PARTS)):
            is_first = torch.arange(5) == 0
            return self.valid & is_first if self.of_first else self.valid
        has_label = ~self.labels.isnan() if self.task == "regression" else self.labels != IGNORE
        wants_label = self.task == "causal_lm" or isinstance(self.term, HARD)
        return has_label if wants_label else self.valid.any(dim=1)

    def poisoned(self) -> Scene:
        for contents in (self.leaves, self.teacher):
            for name, value in contents.items():
                if name != "head":
                    value[~self.counting(name)] = math.nan
        return self

    def masked(self) -> Scene:
        nothing = math.nan if self.task == "regression" else IGNORE
        self.valid = torch.zeros_like(self.valid)
        self.labels = torch.full_like(self.labels, nothing)
        return self

    def result(
        self, rows: slice = slice(None), counts: Counts | None = None, **changes: Any
    ) -> Result:
        """Total, sums and gradients of some rows, divided by `counts` or by the scene's own."""
        leaves = {n: v.detach().clone().requires_grad_() for n, v in self.leaves.items()}
        self.objective.zero_grad()
        inputs = self.inputs(rows, counts, student=knowledge(leaves, rows), **changes)
        ((total, sums),) = self.objective([inputs])
        total.backward()
        gradients = {n: v.grad for n, v in leaves.items() if v.grad is not None}
        gradients |= {n: p.grad for n, p in self.objective.named_parameters()}
        return Result(total.detach(), sums, gradients)

    def inputs(
        self, rows: slice = slice(None), counts: Counts | None = None, **changes: Any
    ) -> LossInputs:
        """The inputs of some rows, as `result` has them; `changes` replace their parts."""
        usual = LossInputs(
            student=knowledge(self.leaves, rows),
            teacher=knowledge(self.teacher, rows),
            batch=self.batch(rows),
            weights=self.objective.weights,
            per_unit=unit_scales(self.counts(rows) if counts is None else counts, 1).per_unit,
        )
        return replace(usual, **changes)

    def batch(self, rows: slice = slice(None)) -> Batch:
        if self.task != "causal_lm":
            return Batch({}, self.labels[rows], self.valid[rows])
        inputs = {"position_ids": POSITIONS[rows]}
        return Batch(inputs, self.labels[rows], self.valid[rows], is_rollout=self.rollouts)

    def counts(self, rows: slice = slice(None)) -> Counts:
        return count_units([self.batch(rows)], self.objective.counters)


class Result:
    def __init__(self, total: torch.Tensor, sums: dict, gradients: dict) -> None:
        self.total, self.sums, self.gradients = total, sums, gradients


def knowledge(contents: dict[str, torch.Tensor], rows: slice) -> Outputs:
    states = tuple(v[rows] for name, v in contents.items() if name.startswith("state"))
    layers = sum(name.startswith("queries") for name in contents)
    width = contents["queries1"].shape[-1] // QUERY_HEADS
    vectors = (
        AttentionVectors(*(contents[f"{part}{i}"][rows] for part in PARTS), width)
        for i in range(1, layers + 1)
    )
    inner = Outputs(hidden_states=states, attention=(None, *vectors))
    if "logits" in contents:
        return inner._replace(logits=contents["logits"][rows])
    return inner._replace(hidden=contents["hidden"][rows], head=Matrix(contents["head"]))  # type: ignore[arg-type]
