"""Positions of rollouts and of data: their counts, their names, and where the marks are kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakd.contract.batch import IGNORE, Batch, Extras, Targets
from megakd.contract.joined_batches import joined
from megakd.contract.terms import (
    HardCrossEntropy,
    HiddenMse,
    PluginTerm,
    SoftTargetKl,
    source_of,
    term_name,
)
from megakd.contract.unit_counts import (
    count_units,
    of_source,
    on_source,
    source_counters,
    without_source,
)

BOTH = {**source_counters("rollouts"), **source_counters("data")}


def batch_of(labels: list[list[int]], rollouts: list[list[int]] | None) -> Batch:
    marks = None if rollouts is None else torch.tensor(rollouts).bool()
    values = torch.tensor(labels)
    return Batch({}, values, torch.ones_like(values).bool(), extras=Extras(is_rollout=marks))


def counted(*batches: Batch) -> dict[str, int]:
    return {unit: int(count) for unit, count in count_units(batches, BOTH).items()}


def test_labelled_positions_are_counted_by_source_and_add_up_over_micro_batches():
    first = batch_of([[4, IGNORE, 5], [1, 2, 3]], [[1, 1, 0], [0, 0, 1]])

    assert counted(first) == {"rollout_targets": 2, "data_targets": 3}
    assert counted(first, first) == {"rollout_targets": 4, "data_targets": 6}


def test_texts_without_marks_are_data():
    assert counted(batch_of([[4, IGNORE, 5]], None)) == {"rollout_targets": 0, "data_targets": 2}


@given(st.integers(0, 2**12 - 1), st.integers(0, 2**12 - 1), st.integers(0, 2**12 - 1))
def test_targets_of_both_vocabularies_are_counted_once_by_source(labelled, marked, chosen):
    bits = torch.arange(12)
    has_label, rollouts, second = ((n >> bits & 1).bool() for n in (labelled, marked, chosen))
    labels = torch.where(has_label & ~second, bits, IGNORE).view(3, 4)
    positions = second.nonzero()[:, 0]
    batch = Batch(
        {},
        labels,
        torch.ones(3, 4).bool(),
        targets=torch.cat([(labels.flatten() != IGNORE).nonzero()[:, 0], positions[:1]]),
        extras=Extras(
            second=Targets(positions, torch.where(has_label, bits, IGNORE)[positions]),
            is_rollout=rollouts.view(3, 4),
        ),
    )

    assert counted(batch) == {
        "rollout_targets": int((has_label & rollouts).sum()),
        "data_targets": int((has_label & ~rollouts).sum()),
    }


def test_every_target_position_belongs_to_one_source():
    batch = batch_of([[4, IGNORE, 5]], [[1, 0, 0]])._replace(targets=torch.tensor([2, 0]))

    assert of_source(batch, "rollouts").tolist() == [False, True]
    assert of_source(batch, "data").tolist() == [True, False]


def test_marks_stay_on_the_cpu_where_losses_read_them_without_waiting():
    from megakd.engine.student import device_batch

    batch = batch_of([[4, 5]], [[1, 0]])
    batch = batch.extended(others={"assistant": batch})._replace(rows=torch.tensor([7]))

    moved = device_batch(batch, torch.device("meta"))

    assert moved.labels.is_meta
    assert moved.of("assistant").labels.is_meta
    for own in (moved, moved.of("assistant")):
        assert own.extras.is_rollout.tolist() == [[True, False]]
    assert moved.rows.tolist() == [7]
    assert of_source(moved, "data").is_cpu


def test_micro_batches_that_a_teacher_answers_together_need_no_marks():
    batches = [batch_of([[4, 5]], [[1, 0]]), batch_of([[4, 5, 6]], None)]

    assert joined(batches).extras.is_rollout is None


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
    assert without_source(name) == term.loss
    assert "/" not in name  # which separates a view from the name
