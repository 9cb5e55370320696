"""Micro-batches of a step: by number of rows, and packed by a token budget."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE
from megakd.data.collation import Collator
from megakd.data.loader import StepLoader
from megakd.data.step_layout import StepLayout, StepShape, collate_step, packed_row
from megakd.data.token_tables import pack
from megakd.errors import DataError

LONGEST, BUDGET = 10, 21
COLLATE = Collator(
    SimpleNamespace(pad_token_id=7),
    TaskConfig(type="causal_lm", dataset="none", max_length=LONGEST),
)
LENGTHS = st.lists(st.integers(1, LONGEST), min_size=1, max_size=9)


def conversations(lengths: list[int], *, rollouts: bool = False) -> dict[str, list]:
    """Columns of rows without positions; tokens are different everywhere."""
    ends = np.cumsum([0, *lengths])
    ids = [list(range(100 + first, 100 + end)) for first, end in pairwise(ends)]
    rows = {
        "input_ids": ids,
        "labels": [[*row[1:], IGNORE] for row in ids],
        "prompt_length": [1] * len(ids),
    }
    return rows | ({"is_rollout": [n % 2 == 0 for n in range(len(ids))]} if rollouts else {})


def texts_of(batches) -> Counter:
    """Every text with its positions, labels and origin, however the texts are laid out."""
    result: Counter = Counter()
    for batch in batches:
        plain, generated = torch.zeros_like(batch.valid), batch.extras.is_rollout
        rollouts = plain if generated is None else generated
        columns = (*map(batch.inputs.get, ("input_ids", "position_ids")), batch.labels, rollouts)
        values = list(zip(*(c[batch.valid].tolist() for c in columns), strict=True))
        starts = [n for n, value in enumerate(values) if value[1] == 0]
        for first, end in pairwise([*starts, len(values)]):
            result[tuple(values[first:end])] += 1
    return result


def steps(rows, ranks: int, budget: int | None) -> list:
    """The micro-batches of all ranks."""
    return [
        batch
        for rank in range(ranks)
        for batch in collate_step(rows, StepLayout(StepShape(9, 1, rank, ranks), budget), COLLATE)
    ]


@given(lengths=LENGTHS, ranks=st.integers(1, 3), rollouts=st.booleans(), arrow=st.booleans())
@settings(max_examples=50)
def test_a_packed_step_holds_the_texts_of_the_padded_step(lengths, ranks, rollouts, arrow):
    rows = conversations(lengths, rollouts=rollouts)
    packed = steps(pa.table(rows) if arrow else rows, ranks, BUDGET)

    assert texts_of(packed) == texts_of(steps(rows, ranks, None))
    assert sum(texts_of(packed).values()) == len(lengths)
    for batch in packed:
        length = batch.valid.shape[1]
        assert batch.valid.shape[0] == 1
        assert length <= BUDGET
        assert length % 8 == 0 or length == BUDGET
        assert batch.labels[~batch.valid].eq(IGNORE).all()
        assert (batch.extras.is_rollout is not None) == rollouts
        # The texts and the padding are its documents.
        sizes = batch.documents.starts.diff().tolist()
        assert sum(sizes) == length
        assert batch.documents.longest == max(sizes)


def test_rows_that_are_packed_documents_keep_their_own_restarts():
    rows = [row._asdict() for row in pack([[1, 2, 3], [4, 5], [6] * 9], 8)]

    batch = packed_row(COLLATE(rows), most=16)

    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, *range(6), 0, 1]]
    assert batch.documents.starts.diff().tolist() == [3, 2, 3, 6, 2]
    assert batch.labels[0, 7] == 6  # the next token is in the next row


def test_a_rank_without_rows_gets_a_micro_batch_with_nothing_valid():
    rows = conversations([4], rollouts=True)
    busy, idle = (
        collate_step(rows, StepLayout(StepShape(9, 1, rank, 2), BUDGET), COLLATE)
        for rank in range(2)
    )

    assert [batch.valid.sum().item() for batch in (*busy, *idle)] == [4, 0]
    assert idle[0].labels.eq(IGNORE).all()
    # No branch on the presence of generated texts may differ between ranks.
    assert not idle[0].extras.is_rollout.any()


def test_generated_texts_are_marked_and_positions_restart_at_padding():
    batch = COLLATE(conversations([2, 3], rollouts=True), dummy_rows=1)

    assert batch.extras.is_rollout.tolist() == [[True] * 2 + [False] * 6, [False] * 8, [False] * 8]
    assert batch.inputs["position_ids"][1].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def loader(rows: Dataset, budget: int | None, rank: int = 0, ranks: int = 1) -> StepLoader:
    layout = StepLayout(StepShape(4 // ranks, 2, rank, ranks), budget)
    return StepLoader(rows, COLLATE, layout=layout, seed=3)


def test_the_loader_packs_the_rows_of_the_padded_step():
    rng = np.random.default_rng(0)
    rows = Dataset.from_dict(conversations(rng.integers(1, LONGEST + 1, size=21).tolist()))
    chosen = rows.select(rng.permutation(21))

    padded, packed = loader(chosen, None), loader(chosen, BUDGET)

    assert packed.steps_per_epoch == padded.steps_per_epoch == 3
    for index in range(7):
        ranks = [loader(chosen, BUDGET, rank, 2) for rank in range(2)]
        both = [part for one in ranks for part in one.step(index)]
        assert texts_of(packed.step(index)) == texts_of(padded.step(index)) == texts_of(both)
        assert all(batch.rows is None for batch in both)
    assert len({len(packed.step(index)) for index in range(3)}) > 1


BUDGET = 24
BUDGETED = st.lists(st.integers(0, BUDGET), max_size=40).map(lambda n: np.array(n, dtype=np.int64))
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


@given(lengths=BUDGETED, ranks=RANKS)
@settings(max_examples=60)
def test_every_row_occurs_once_within_the_budget_and_the_ranks_share_the_tokens(lengths, ranks):
    dealt = micro_batches(lengths, ranks)

    rows = [row for parts in dealt for part in parts for row in part]
    assert sorted(rows) == list(range(len(lengths)))
    by_rank = [loads(lengths, parts) for parts in dealt]
    assert max(map(max, by_rank)) <= BUDGET
    (count,) = {len(parts) for parts in dealt}
    assert count >= 1
    # First fit needs at most twice the number of full micro-batches, and then fills up the ranks.
    assert count * ranks < 2 * lengths.sum() / BUDGET + 1 + ranks
    # Dealt in turns, the longest of a turn to the rank with the fewest tokens so far.
    totals = [sum(tokens) for tokens in by_rank]
    assert max(totals) - min(totals) <= max(map(max, by_rank))


def test_rows_are_spread_over_the_micro_batches_that_the_ranks_need():
    # First fit fills three micro-batches, of 24, 24 and 12 tokens; two ranks take four.
    lengths = np.full(10, 6)

    assert [loads(lengths, parts) for parts in micro_batches(lengths, 2)] == [[18, 12], [18, 12]]


def test_a_tight_fit_is_kept_where_spreading_would_exceed_the_budget():
    lengths = np.array([5, 5, 4, 3, 3])  # spread evenly: 5 + 4 and 5 + 3 + 3

    assert [loads(lengths, parts) for parts in micro_batches(lengths, 1, 10)] == [[10, 10]]


@given(
    lengths=st.lists(st.integers(1, 16), min_size=12, max_size=12).map(np.array),
    ranks=RANKS,
    budget=st.integers(16, 80),
)
@settings(max_examples=50)
def test_no_step_has_more_micro_batches_than_the_largest_step(lengths, ranks, budget):
    layout = StepLayout(StepShape(12 // ranks, 1, 0, ranks), budget)

    assert len(layout.micro_batches(lengths)) <= layout.most_micro_batches(16)
    equal = np.full(12, 16)
    assert len(layout.micro_batches(equal)) == layout.most_micro_batches(16)


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
