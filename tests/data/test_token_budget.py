"""Rows packed by a token budget: every row once, no micro-batch too long, ranks in step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.data.step_layout import StepLayout, StepShape
from megakd.errors import DataError

BUDGET = 24
LENGTHS = st.lists(st.integers(0, BUDGET), max_size=40).map(lambda n: np.array(n, dtype=np.int64))
RANKS = st.integers(1, 3)


def micro_batches(lengths, ranks: int, budget: int = BUDGET) -> list[list[list[int]]]:
    """By rank, the rows of every micro-batch."""
    return [
        [
            part.tolist()
            for part in StepLayout(StepShape(2, 3, rank, ranks), budget).micro_batches(lengths)
        ]
        for rank in range(ranks)
    ]


def loads(lengths, parts: list[list[int]]) -> list[int]:
    return [int(lengths[part].sum()) for part in parts]


@given(lengths=LENGTHS, ranks=RANKS)
@settings(max_examples=200, deadline=None)
def test_every_row_occurs_once_and_no_micro_batch_exceeds_the_budget(lengths, ranks):
    dealt = micro_batches(lengths, ranks)

    rows = [row for parts in dealt for part in parts for row in part]
    assert sorted(rows) == list(range(len(lengths)))
    assert all(load <= BUDGET for parts in dealt for load in loads(lengths, parts))


@given(lengths=LENGTHS, ranks=RANKS)
@settings(max_examples=100, deadline=None)
def test_every_rank_has_as_many_micro_batches_and_at_least_one(lengths, ranks):
    (count,) = {len(parts) for parts in micro_batches(lengths, ranks)}

    assert count >= 1
    # First fit needs at most twice the number of full micro-batches, and then fills up the ranks.
    assert count * ranks < 2 * lengths.sum() / BUDGET + 1 + ranks


@given(lengths=LENGTHS, per_device=st.integers(1, 5), accumulation=st.integers(1, 4), ranks=RANKS)
@settings(max_examples=100, deadline=None)
def test_the_layout_is_a_function_of_the_lengths_the_budget_and_the_ranks(
    lengths, per_device, accumulation, ranks
):
    layouts = [
        StepLayout(StepShape(per_device, accumulation, rank, ranks), BUDGET)
        for rank in range(ranks)
    ]

    found = [[part.tolist() for part in layout.micro_batches(lengths.copy())] for layout in layouts]

    assert found == micro_batches(lengths, ranks)


@given(lengths=LENGTHS, ranks=RANKS)
@settings(max_examples=100, deadline=None)
def test_ranks_get_about_equal_numbers_of_tokens(lengths, ranks):
    by_rank = [loads(lengths, parts) for parts in micro_batches(lengths, ranks)]
    totals = [sum(own) for own in by_rank]

    # Dealt in turns, the longest of a turn to the rank with the fewest tokens so far.
    assert max(totals) - min(totals) <= max(max(own) for own in by_rank)


def test_rows_are_spread_over_the_micro_batches_that_the_ranks_need():
    # First fit fills three micro-batches, of 24, 24 and 12 tokens; two ranks take four.
    lengths = np.full(10, 6)

    assert [loads(lengths, parts) for parts in micro_batches(lengths, 2)] == [[18, 12], [18, 12]]


def test_a_tight_fit_is_kept_where_spreading_would_exceed_the_budget():
    lengths = np.array([5, 5, 4, 3, 3])  # spread evenly: 5 + 4 and 5 + 3 + 3

    assert [loads(lengths, parts) for parts in micro_batches(lengths, 1, 10)] == [[10, 10]]


def test_equal_rows_need_no_more_micro_batches_than_the_largest_step():
    for budget, longest, count in ((40, 16, 3), (16, 16, 6), (100, 16, 1), (31, 16, 6)):
        layout = StepLayout(StepShape(6, 1), budget)
        assert layout.most_micro_batches(longest) == count
        assert len(layout.micro_batches(np.full(6, longest))) == count


@given(
    lengths=st.lists(st.integers(1, 16), min_size=12, max_size=12).map(np.array),
    ranks=RANKS,
    budget=st.integers(16, 80),
)
@settings(max_examples=200, deadline=None)
def test_no_step_has_more_micro_batches_than_the_largest_step(lengths, ranks, budget):
    layout = StepLayout(StepShape(12 // ranks, 1, 0, ranks), budget)

    assert len(layout.micro_batches(lengths)) <= layout.most_micro_batches(16)


def test_a_row_above_the_budget_is_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"train.tokens_per_rank is 24, and a training row has 25"):
        micro_batches(np.array([3, 25]), 1)


def test_without_a_budget_rows_are_dealt_by_number():
    dealt = [
        StepLayout(StepShape(2, 2, rank, 2)).micro_batches(np.full(7, 900)) for rank in range(2)
    ]

    assert [[part.tolist() for part in parts] for parts in dealt] == [
        [[0, 4], [2, 6]],
        [[1, 5], [3]],
    ]
