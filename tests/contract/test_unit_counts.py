"""Divisors of a step: units counted by name, of every run and of a loss group."""

from __future__ import annotations

import math

import pytest
import torch
from unit_counts import counts_of, numbers

from megakd.contract.batch import IGNORE, Batch, Knowledge, LossInputs
from megakd.contract.stage import Pass
from megakd.contract.terms import HardCrossEntropy
from megakd.contract.unit_counts import count_units, unit_weights
from megakd.contract.views import Shape
from megakd.losses.bundle import StudentBundle
from megakd.losses.class_targets import HardClasses
from megakd.losses.objective import Objective, build_objective
from megakd.losses.targets import Evaluated, TermGroup

CE = HardCrossEntropy(loss="hard_cross_entropy")


def labelled(labels: torch.Tensor, valid: list[list[int]]) -> Batch:
    return Batch({}, labels, torch.tensor(valid).bool())


def test_units_of_classification_count_unlabelled_rows_as_examples_and_dummy_rows_not_at_all():
    batch = labelled(torch.tensor([1, IGNORE, IGNORE]), [[1, 1, 1], [1, 1, 0], [0, 0, 0]])

    assert numbers(count_units([batch])) == (2, 1, 5)


def test_units_of_regression_count_scores_that_are_there():
    batch = labelled(torch.tensor([-100.0, math.nan]), [[1, 1], [1, 0]])

    assert numbers(count_units([batch])) == (2, 1, 3)  # -100 is a score like any other


def test_units_of_a_language_model_count_positions_and_add_up_over_micro_batches():
    first = labelled(torch.tensor([[4, 5, IGNORE]]), [[1, 1, 1]])
    second = labelled(torch.tensor([[7, IGNORE, IGNORE]]), [[1, 1, 0]])

    counts = count_units([first, second])

    assert numbers(counts) == (2, 3, 5)
    assert all(count.dtype == torch.int64 for count in counts.values())


def test_a_unit_weighs_the_world_size_over_its_global_count_which_is_at_least_one():
    weights = unit_weights(counts_of(4, 0, 32), 2)

    expected = {"examples": 0.5, "targets": 2.0, "tokens": 0.0625}
    assert {unit: weight.item() for unit, weight in weights.items()} == expected


class Words(TermGroup):
    """A term that is summed over words, which this group alone can count."""

    def __init__(self) -> None:
        super().__init__()
        self.units = {"word_length": "words"}
        self.counters = {"words": lambda batch: batch.inputs["words"].sum()}

    def forward(self, reading: LossInputs) -> Evaluated:
        total = (reading.student.logits[:, 0] * reading.batch.inputs["words"]).sum()
        weight = reading.weights["word_length"] * reading.per_unit["words"]
        return Evaluated(total * weight, {"word_length": total.detach()})


class Reader(torch.nn.Module):
    """A model of one weight: the logits of row i are i times the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))


ROWS, WORDS = torch.arange(1.0, 5.0), torch.tensor([3, 0, 1, 2])


def step(cuts: list[slice], monkeypatch: pytest.MonkeyPatch) -> tuple[float, float, float]:
    """Return loss, gradient and reported term of one step that is cut into micro-batches."""

    def read(model: Reader, batch: Batch, needs: object) -> Knowledge:
        return Knowledge(logits=(batch.inputs["numbers"] * model.weight)[:, None].repeat(1, 3))

    monkeypatch.setattr("megakd.losses.bundle.read_knowledge", read)
    objective = Objective([HardClasses(CE), Words()], {CE.loss: 0.5, "word_length": 1.0})
    bundle = StudentBundle({"student": Reader()}, objective, world_size=1)
    labels, valid = torch.tensor([0, 1, IGNORE, 2]), torch.ones(4, 1, dtype=torch.bool)
    batches = [
        Batch({"numbers": ROWS[rows], "words": WORDS[rows]}, labels[rows], valid[rows])
        for rows in cuts
    ]
    counts = count_units(batches, objective.counters)
    losses = [bundle(batch, {}, (Pass(),), counts) for batch in batches]
    total = torch.stack([loss.total for loss in losses]).sum()
    total.backward()
    reported = sum(loss.parts["word_length"].item() for loss in losses)
    return total.item(), bundle.student.weight.grad.item(), reported


def test_a_group_may_divide_by_a_unit_of_its_own_however_the_step_is_cut(monkeypatch):
    whole = step([slice(0, 4)], monkeypatch)
    halves = step([slice(0, 1), slice(1, 4)], monkeypatch)

    # (1·3 + 3·1 + 4·2) · weight / 6 words, as a mean over words and not over rows
    assert whole[2] == pytest.approx(14 * 2 / 6)
    assert halves == pytest.approx(whole)


def test_every_run_counts_examples_targets_and_tokens_whatever_its_groups_count():
    supervised = build_objective((CE,), "classification", Shape(1, 4, 3), None)
    of_words = Objective([Words()], {"word_length": 1.0})

    assert [*supervised.counters] == ["examples", "targets", "tokens"]
    assert [*of_words.counters] == ["examples", "targets", "tokens", "words"]
