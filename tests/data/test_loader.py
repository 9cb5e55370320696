"""The step loader: the same rows a step, however they are dealt out and laid out."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.config.task import TaskConfig
from megakd.data.batch import IGNORE, ROUTE, Batch, teacher_number
from megakd.data.collation import Collator
from megakd.data.loader import (
    STEPS_AHEAD,
    STEPS_AT_ONCE,
    StepLayout,
    StepLoader,
    StepShape,
    collate_step,
    evaluation_batches,
    global_batches,
    packed_row,
)
from megakd.data.token_tables import pack
from megakd.errors import DataError

COUNTS = st.integers(1, 40)
SMALL = st.integers(1, 4)


def _numbered(count: int) -> Dataset:
    return Dataset.from_dict({"input_ids": [[n] for n in range(count)], "label": range(count)})


def _collate(rows, *, dummy_rows=0) -> Batch:
    """Row numbers as labels, -1 for dummies."""
    numbers = [*(rows.column("label").to_pylist() if rows else []), *[-1] * dummy_rows]
    labels = torch.tensor(numbers)
    return Batch({}, labels, (labels >= 0)[:, None])


def _numbers(batches) -> list[int]:
    return [n for batch in batches for n in batch.labels.tolist() if n >= 0]


def _loader(count: int, shape: StepShape, seed: int = 3, collate=_collate) -> StepLoader:
    return StepLoader(_numbered(count), collate, layout=StepLayout(shape), seed=seed)


@given(count=COUNTS, per_device=SMALL, accumulation=SMALL, world=SMALL, epoch=st.integers(0, 3))
@settings(max_examples=30)
def test_an_epoch_has_every_row_once_and_the_same_rows_a_step_however_it_is_dealt(
    count, per_device, accumulation, world, epoch
):
    whole = _loader(count, StepShape(per_device * accumulation * world, 1))
    shapes = (StepShape(per_device, accumulation, rank, world) for rank in range(world))
    dealt = [_loader(count, shape) for shape in shapes]
    steps = whole.steps_per_epoch
    assert {loader.steps_per_epoch for loader in dealt} == {steps}
    size = min(per_device, math.ceil(count / (accumulation * world)))

    seen: Counter[int] = Counter()
    for index in range(epoch * steps, (epoch + 1) * steps):
        batches = [batch for loader in dealt for batch in loader.step(index)]
        assert [len(batch.labels) for batch in batches] == [size] * accumulation * world
        assert sorted(_numbers(batches)) == sorted(_numbers(whole.step(index)))
        seen.update(_numbers(batches))

    assert seen == Counter(range(count))


def test_epochs_and_seeds_differ_and_a_step_is_always_the_same():
    loader, again, other = (_loader(32, StepShape(8, 2), seed=seed) for seed in (3, 3, 4))
    backwards = [_numbers(again.step(index)) for index in reversed(range(6))][::-1]

    assert [_numbers(loader.step(index)) for index in range(6)] == backwards
    assert backwards[0] + backwards[1] != backwards[2] + backwards[3]
    assert backwards[0] != _numbers(other.step(0))


def test_no_step_has_a_prompt_without_an_answer():
    """Such rows have no target, so that a step of them would have a loss of 0."""
    lengths = [1 if n % 3 == 0 else 2 for n in range(12)]
    columns = {"input_ids": [[7, 7]] * 12, "label": range(12), "prompt_length": lengths}
    layout = StepLayout(StepShape(2, 1))

    loader = StepLoader(Dataset.from_dict(columns), _collate, layout=layout, seed=3)

    assert loader.steps_per_epoch == 2
    epoch = [row for index in range(2) for row in _numbers(loader.step(index))]
    assert sorted(epoch) == [0, 3, 6, 9]


def test_only_a_few_steps_are_fetched_ahead_in_a_thread_that_ends_with_the_consumer():
    made: list[str] = []

    def slow(rows, *, dummy_rows=0):
        made.append(threading.current_thread().name)
        time.sleep(0.02)
        return _collate(rows, dummy_rows=dummy_rows)

    before, loader = set(threading.enumerate()), _loader(100, StepShape(1, 1), collate=slow)
    steps, began = loader.iterate(0, 90), time.perf_counter()
    next(steps)
    assert 0 < loader.waited_s <= time.perf_counter() - began
    time.sleep(0.1)
    steps.close()

    assert 1 <= len(made) <= STEPS_AHEAD + STEPS_AT_ONCE
    assert len(set(made)) == 1
    assert threading.current_thread().name not in made
    assert set(threading.enumerate()) == before


def test_iterating_gives_the_steps_of_chosen_rows_in_order_or_the_error_of_a_step():
    chosen = _numbered(20).select(np.array([3, 17, 4, 11]))
    loader = StepLoader(chosen, _collate, layout=StepLayout(StepShape(2, 1)), seed=0)

    iterated = [_numbers(batches) for batches in loader.iterate(1, 9)]

    assert iterated == [_numbers(loader.step(index)) for index in range(1, 9)]
    assert {row for rows in iterated for row in rows} == {3, 4, 11, 17}
    assert list(loader.iterate(4, 4)) == []

    def broken(rows, *, dummy_rows=0):
        raise DataError(f"row cannot be read, {dummy_rows}")

    with pytest.raises(DataError, match="row cannot be read"):
        list(_loader(4, StepShape(4, 1), collate=broken).iterate(0, 3))
    with pytest.raises(DataError, match="training split has no rows"):
        _loader(0, StepShape(1, 1))
    with pytest.raises(DataError, match="cannot evaluate on a split that has no rows"):
        next(evaluation_batches(_numbered(0), _collate, batch_size=2, rank=0, world=1))


@given(count=COUNTS, batch_size=SMALL, world=SMALL)
@settings(max_examples=30)
def test_all_ranks_together_meet_every_row_once_in_as_many_batches_each(count, batch_size, world):
    rows = _numbered(count)
    options = {"batch_size": batch_size, "world": world}
    ranks = [[*evaluation_batches(rows, _collate, rank=n, **options)] for n in range(world)]

    met = [number for batches in ranks for number in _numbers(batches)]

    assert sorted(met) == list(range(count))
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch.labels) for batches in ranks for batch in batches} == {min(batch_size, count)}


@given(count=COUNTS, batch_size=st.integers(1, 40), most=SMALL, world=SMALL)
@settings(max_examples=20)
def test_a_batch_of_all_ranks_has_the_same_rows_however_it_is_dealt(count, batch_size, most, world):
    collected: dict[int, list[int]] = {}
    for rank in range(world):
        shape = StepShape.of_batch(batch_size, most, rank=rank, world=world)
        assert shape.per_device <= most
        batches = global_batches(_numbered(count), _collate, shape=shape, batch_size=batch_size)
        for index, batch in enumerate(batches):
            micro_batches = list(batch)
            assert len(micro_batches) == shape.accumulation
            size = min(shape.per_device, math.ceil(count / (shape.accumulation * world)))
            assert {len(part.labels) for part in micro_batches} == {size}
            collected.setdefault(index, []).extend(_numbers(micro_batches))

    rows = [sorted(collected[index]) for index in sorted(collected)]
    starts = range(0, count, batch_size)
    assert rows == [list(range(start, min(start + batch_size, count))) for start in starts]


LONGEST, TOKENS = 10, 21
TASK = TaskConfig(type="causal_lm", dataset="none", max_length=LONGEST)
COLLATE = Collator(SimpleNamespace(pad_token_id=7), TASK)
LENGTHS = st.lists(st.integers(1, LONGEST), min_size=1, max_size=9)


def conversations(lengths: list[int]) -> dict[str, list]:
    """Columns of rows without positions; tokens are different everywhere."""
    ends = np.cumsum([0, *lengths])
    ids = [list(range(100 + first, 100 + end)) for first, end in pairwise(ends)]
    labels = [[*row[1:], IGNORE] for row in ids]
    return {"input_ids": ids, "labels": labels, "prompt_length": [1] * len(ids)}


def texts_of(batches) -> Counter:
    """Every text with its positions and labels, however the texts are laid out."""
    result: Counter = Counter()
    for batch in batches:
        columns = (*map(batch.inputs.get, ("input_ids", "position_ids")), batch.labels)
        values = list(zip(*(c[batch.valid].tolist() for c in columns), strict=True))
        starts = [n for n, value in enumerate(values) if value[1] == 0]
        for first, end in pairwise([*starts, len(values)]):
            result[tuple(values[first:end])] += 1
    return result


def steps(rows, ranks: int, budget: int | None) -> list:
    """The micro-batches of all ranks."""
    layouts = [StepLayout(StepShape(9, 1, rank, ranks), budget) for rank in range(ranks)]
    return [batch for layout in layouts for batch in collate_step(rows, layout, COLLATE)]


@given(lengths=LENGTHS, ranks=st.integers(1, 3), arrow=st.booleans())
@settings(max_examples=50)
def test_a_packed_step_holds_the_texts_of_the_padded_step(lengths, ranks, arrow):
    rows = conversations(lengths)
    packed = steps(pa.table(rows) if arrow else rows, ranks, TOKENS)

    assert texts_of(packed) == texts_of(steps(rows, ranks, None))
    assert sum(texts_of(packed).values()) == len(lengths)
    for batch in packed:
        length = batch.valid.shape[1]
        assert batch.valid.shape[0] == 1
        assert length <= TOKENS
        assert length % 8 == 0 or length == TOKENS
        assert batch.labels[~batch.valid].eq(IGNORE).all()
        # The texts and the padding are its documents.
        sizes = batch.documents.starts.diff().tolist()
        assert sum(sizes) == length
        assert batch.documents.longest == max(sizes)


def test_positions_restart_at_documents_and_at_padding():
    rows = [row._asdict() for row in pack([[1, 2, 3], [4, 5], [6] * 9], 8)]

    batch = packed_row(COLLATE(rows), most=16)
    padded = COLLATE(conversations([2, 3]), dummy_rows=1)

    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, *range(6), 0, 1]]
    assert batch.documents.starts.diff().tolist() == [3, 2, 3, 6, 2]
    assert batch.labels[0, 7] == 6  # the next token is in the next row
    assert padded.inputs["position_ids"][1].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_rows_of_like_lengths_share_a_micro_batch_and_steps_keep_their_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, LONGEST + 1, size=21)
    rows = Dataset.from_dict(conversations(lengths.tolist()))

    def loader(rank: int = 0, ranks: int = 1, **options: bool) -> StepLoader:
        layout = StepLayout(StepShape(2, 4 // ranks, rank, ranks), **options)
        return StepLoader(rows, COLLATE, layout=layout, seed=3)

    def numbers(batches) -> list[list[int]]:
        return [batch.rows[batch.rows >= 0].tolist() for batch in batches]

    for index in range(6):
        alike = numbers(loader(by_length=True).step(index))
        ranks = [numbers(loader(rank, 2, by_length=True).step(index)) for rank in range(2)]

        for part in (alike, numbers(loader().step(index))):
            assert sorted(chain(*part)) == sorted(loader().step_rows(index).tolist())
        ordered = [length for part in alike for length in sorted(lengths[part].tolist())]
        assert ordered == sorted(ordered)
        assert [part for turn in zip(*ranks, strict=True) for part in turn] == alike


BUDGET = 24
BUDGETED = st.lists(st.integers(0, BUDGET), max_size=40).map(lambda n: np.array(n, dtype=np.int64))
RANKS = st.integers(1, 3)


def micro_batches(lengths, ranks: int, budget: int | None = BUDGET) -> list[list[list[int]]]:
    """By rank, the rows of every micro-batch."""
    layouts = (StepLayout(StepShape(2, 3, rank, ranks), budget) for rank in range(ranks))
    return [[part.rows.tolist() for part in one.micro_batches(lengths)] for one in layouts]


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
    # At most twice the number of full micro-batches, filled up to a multiple of the ranks.
    assert count * ranks < 2 * lengths.sum() / BUDGET + 1 + ranks
    # Dealt in turns, the longest of a turn to the first and the last rank.
    totals = [sum(tokens) for tokens in by_rank]
    assert max(totals) - min(totals) <= max(map(max, by_rank))


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget", "dealt"),
    [
        # Three micro-batches hold 60 tokens; two ranks take four.
        ([6] * 10, 2, BUDGET, [[18, 12], [18, 12]]),
        # In two: 5 + 4 and 5 + 3 + 3, which is above the budget.
        ([5, 5, 4, 3, 3], 1, 10, [[8, 7, 5]]),
    ],
)
def test_rows_are_spread_over_the_micro_batches_within_the_budget(lengths, ranks, budget, dealt):
    lengths = np.array(lengths)

    assert [loads(lengths, parts) for parts in micro_batches(lengths, ranks, budget)] == dealt


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
    assert micro_batches(np.full(7, 900), 2, None) == [[[0, 6], [2], [4]], [[1], [3], [5]]]


TEACHERS = ("math", "code", "chat")


@given(
    named=st.lists(st.sampled_from(TEACHERS), min_size=1, max_size=30),
    ranks=RANKS,
    budget=st.sampled_from([None, BUDGET]),
)
@settings(max_examples=40)
def test_a_micro_batch_has_rows_of_one_teacher_the_same_on_all_ranks(named, ranks, budget):
    routes, lengths = np.array([*map(teacher_number, named)]), np.arange(len(named)) % 9 + 1

    shapes = (StepShape(3, 2, rank, ranks) for rank in range(ranks))
    dealt = [StepLayout(s, budget, TEACHERS).micro_batches(lengths, routes) for s in shapes]

    names = [[part.teacher for part in parts] for parts in dealt]
    assert names == [names[0]] * ranks
    assert {*names[0]} == {*named}
    rows = [(row, part.teacher) for parts in dealt for part in parts for row in part.rows]
    assert sorted(rows) == list(enumerate(named))
    if budget is None:
        assert max(len(part.rows) for parts in dealt for part in parts) <= 3
        most = Counter(named).most_common(1)[0][1]
        assert names[0].count(names[0][0]) <= -(-most // (3 * ranks))


@pytest.mark.parametrize("budget", [None, TOKENS])
def test_the_loader_gives_each_row_to_its_teacher_and_a_rank_without_rows_a_dummy_row(budget):
    named = ["math", "code", "math", "math", "math"]
    columns = conversations([3, 4, 5, 6, 7]) | {ROUTE: [*map(teacher_number, named)]}
    rows = Dataset.from_dict(columns)

    def step(rank: int, ranks: int) -> list[Batch]:
        layout = StepLayout(StepShape(4, 2, rank, ranks), budget, TEACHERS)
        return [*StepLoader(rows, COLLATE, layout=layout, seed=3).step(0)]

    both = [step(rank, 2) for rank in range(2)]
    for name in ("math", "code"):
        chosen = rows.select([n for n, teacher in enumerate(named) if teacher == name])
        expected = texts_of(steps(chosen.remove_columns(ROUTE)[:], 1, budget))
        for batches in (step(0, 1), [*both[0], *both[1]]):
            assert texts_of([b for b in batches if b.teacher == name]) == expected
    idle = [batch for parts in both for batch in parts if not batch.valid.any()]
    assert [(len(batch.valid), batch.teacher) for batch in idle] == [(1, "code")]
