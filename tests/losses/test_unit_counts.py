"""Divisors of a step, units by name and by source of the text, and passes that share a backward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from unit_counts import numbers

from megakd.config.terms import (
    TERMS,
    HardCrossEntropy,
    HiddenMse,
    PluginTerm,
    Shape,
    SoftTargetKl,
    on_source,
    source_of,
    term_name,
)
from megakd.data.batch import (
    IGNORE,
    Batch,
    LossInputs,
    Outputs,
    Pass,
    backward_groups,
    count_units,
    source_counters,
)
from megakd.errors import MegakdError
from megakd.losses.bundle import StudentBundle
from megakd.losses.objective import Objective, build_objective
from megakd.losses.targets import ClassTargets, Evaluated, TermGroup
from megakd.methods.minidisc import Sandwich
from megakd.stage import lower_is_better

CE = HardCrossEntropy(loss="hard_cross_entropy")


def labelled(labels: list[Any], valid: list[list[int]]) -> Batch:
    return Batch({}, torch.tensor(labels), torch.tensor(valid).bool())


@pytest.mark.parametrize(
    ("batches", "units"),
    [
        # A row without a label is an example, and a dummy row is none.
        ([labelled([1, IGNORE, IGNORE], [[1, 1, 1], [1, 1, 0], [0, 0, 0]])], (2, 1, 5)),
        ([labelled([-100.0, math.nan], [[1, 1], [1, 0]])], (2, 1, 3)),  # -100 is a score like any
        # Positions, of two micro-batches.
        (
            [labelled([[4, 5, IGNORE]], [[1, 1, 1]]), labelled([[7, IGNORE, IGNORE]], [[1, 1, 0]])],
            (2, 3, 5),
        ),
    ],
    ids=["classification", "regression", "language model"],
)
def test_units_are_rows_labels_and_positions_and_add_up_over_micro_batches(batches, units):
    counts = count_units(batches)

    assert numbers(counts) == units
    assert all(count.dtype == torch.int64 for count in counts.values())


class Words(TermGroup):
    """A term that is summed over words, which this group alone can count."""

    def __init__(self) -> None:
        super().__init__()
        self.units = {"word_length": "words"}
        self.counters = {"words": lambda batch: batch.inputs["words"].sum()}

    def forward(self, inputs: LossInputs) -> Evaluated:
        total = (inputs.student.logits[:, 0] * inputs.batch.inputs["words"]).sum()
        weight = inputs.weights["word_length"] * inputs.per_unit["words"]
        return Evaluated(total * weight, {"word_length": total.detach()})


ROWS, WORDS = torch.arange(1.0, 5.0), torch.tensor([3, 0, 1, 2])


def step(cuts: list[slice], monkeypatch: pytest.MonkeyPatch) -> tuple[float, float, float]:
    """Return loss, gradient and reported term of one step that is cut into micro-batches.

    The model has one weight: the logits of row i are i times the weight.
    """

    def read(model: torch.nn.ParameterList, batch: Batch, needs: object) -> Outputs:
        return Outputs(logits=(batch.inputs["numbers"] * model[0])[:, None].repeat(1, 3))

    monkeypatch.setattr("megakd.losses.bundle.read_outputs", read)
    objective = Objective([ClassTargets((), CE), Words()], {CE.loss: 0.5, "word_length": 1.0})
    model = torch.nn.ParameterList([torch.tensor(2.0)])
    bundle = StudentBundle({"student": model}, objective, world_size=1)
    labels, valid = torch.tensor([0, 1, IGNORE, 2]), torch.ones(4, 1, dtype=torch.bool)
    inputs = ({"numbers": ROWS[rows], "words": WORDS[rows]} for rows in cuts)
    batches = [Batch(x, labels[rows], valid[rows]) for x, rows in zip(inputs, cuts, strict=True)]
    counts = count_units(batches, objective.counters)
    losses = [bundle(batch, {}, (Pass(),), counts) for batch in batches]
    total = torch.stack([loss.total for loss in losses]).sum()
    total.backward()
    reported = sum(loss.parts["word_length"].item() for loss in losses)
    return total.item(), bundle.student[0].grad.item(), reported


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


BOTH = {**source_counters("rollouts"), **source_counters("data")}


def batch_of(labels: list[list[int]], *, is_rollout: bool) -> Batch:
    values = torch.tensor(labels)
    valid = torch.ones_like(values).bool()
    return Batch({}, values, valid, is_rollout=is_rollout)


def counted(*batches: Batch) -> dict[str, int]:
    return {unit: int(count) for unit, count in count_units(batches, BOTH).items()}


def test_labelled_positions_are_counted_by_source_and_add_up_over_micro_batches():
    texts = batch_of([[4, IGNORE, 5], [1, 2, 3]], is_rollout=True)
    data = batch_of([[4, IGNORE, 5]], is_rollout=False)

    assert counted(texts, texts) == {"rollout_targets": 10, "data_targets": 0}
    assert counted(data) == {"rollout_targets": 0, "data_targets": 2}


def test_numbers_of_rows_stay_on_the_cpu():
    from megakd.training.student import device_batch

    batch = labelled([[4, 5]], [[1, 1]])._replace(rows=torch.tensor([7]))
    batch = batch._replace(others={"assistant": batch}, is_rollout=True, teacher="math")

    moved = device_batch(batch, torch.device("meta"))

    assert moved.labels.is_meta
    assert moved.for_role("assistant").labels.is_meta
    assert moved.rows.tolist() == moved.for_role("assistant").rows.tolist() == [7]
    assert (moved.is_rollout, moved.teacher) == (True, "math")


class Limited(PluginTerm):
    """A loss of another package with an option of the same name."""

    loss = "package:limited"
    on = "rollouts"


@pytest.mark.parametrize(
    ("term", "name"),
    [
        (SoftTargetKl(loss="soft_target_kl"), "soft_target_kl"),
        (SoftTargetKl(loss="soft_target_kl", on="rollouts"), "soft_target_kl_on_rollouts"),
        (HardCrossEntropy(loss="hard_cross_entropy", on="data"), "hard_cross_entropy_on_data"),
        (HiddenMse(loss="hidden_mse"), "hidden_mse"),
        (Limited(loss="package:limited"), "package:limited"),
    ],
)
def test_a_limited_term_has_its_source_in_its_name(term, name):
    assert term_name(term) == name
    assert on_source(term.loss, source_of(term)) == name
    assert "/" not in name  # which separates a view from the name


@pytest.mark.parametrize(("at_once", "lengths"), [(1, [1, 1, 1]), (2, [2, 1]), (5, [3])])
def test_views_share_backwards_of_at_most_a_number_and_a_step_without_passes_is_refused(
    at_once, lengths
):
    plan = list(Sandwich("teacher", tuple("abc"), at_once).passes(0))

    groups = backward_groups(plan)

    assert [len(group) for group in groups] == lengths
    assert [one for group in groups for one in group] == plan
    with pytest.raises(MegakdError, match=r"passes\(\) returned 0 passes .* return a Pass"):
        backward_groups([])


def test_lower_is_better_for_losses_and_higher_for_scores():
    assert all(map(lower_is_better, TERMS.names()))
    assert not any(map(lower_is_better, ("accuracy", "top1_agreement", "matthews_correlation")))
