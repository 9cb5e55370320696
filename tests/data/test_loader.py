"""The step loader: the same rows a step, however they are dealt out."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from megakd.contract.batch import Batch
from megakd.data.loader import (
    STEPS_AHEAD,
    STEPS_AT_ONCE,
    StepLoader,
    evaluation_batches,
    global_batches,
)
from megakd.data.step_layout import StepLayout, StepShape
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


@given(count=COUNTS, per_device=SMALL, accumulation=SMALL, world=SMALL, index=st.integers(0, 20))
@settings(max_examples=40)
def test_a_step_has_the_same_rows_however_it_is_dealt(
    count, per_device, accumulation, world, index
):
    whole = _loader(count, StepShape(per_device * accumulation * world, 1))
    dealt = [
        _loader(count, StepShape(per_device, accumulation, rank, world)) for rank in range(world)
    ]

    rows = [n for loader in dealt for n in _numbers(loader.step(index))]

    assert sorted(rows) == sorted(_numbers(whole.step(index)))
    assert {loader.steps_per_epoch for loader in dealt} == {whole.steps_per_epoch}


@given(count=COUNTS, per_device=SMALL, accumulation=SMALL, world=SMALL)
@settings(max_examples=20)
def test_an_epoch_has_every_row_once_in_batches_of_one_size(count, per_device, accumulation, world):
    seen: Counter[int] = Counter()
    size = min(per_device, math.ceil(count / (accumulation * world)))
    for rank in range(world):
        loader = _loader(count, StepShape(per_device, accumulation, rank, world))
        for index in range(loader.steps_per_epoch):
            batches = loader.step(index)
            assert [len(batch.labels) for batch in batches] == [size] * accumulation
            seen.update(_numbers(batches))

    assert seen == Counter(range(count))


def test_epochs_and_seeds_differ_and_a_step_is_always_the_same():
    loader = _loader(32, StepShape(8, 2))
    again = _loader(32, StepShape(8, 2))
    backwards = [_numbers(again.step(index)) for index in reversed(range(6))][::-1]

    assert [_numbers(loader.step(index)) for index in range(6)] == backwards
    assert _numbers(loader.step(0)) + _numbers(loader.step(1)) != _numbers(
        loader.step(2)
    ) + _numbers(loader.step(3))
    assert _numbers(loader.step(0)) != _numbers(_loader(32, StepShape(8, 2), seed=4).step(0))


def test_no_step_has_a_prompt_without_an_answer():
    """Such rows have no target, so that a step of them would have a loss of 0."""
    ids = [[n, n] for n in range(12)]
    answered = [n % 3 == 0 for n in range(12)]
    columns = {"input_ids": ids, "label": range(12), "prompt_length": [2 - a for a in answered]}
    layout = StepLayout(StepShape(2, 1))

    loader = StepLoader(Dataset.from_dict(columns), _collate, layout=layout, seed=3)

    assert loader.steps_per_epoch == 2
    steps = [_numbers(loader.step(index)) for index in range(4)]
    assert all(len(rows) == 2 for rows in steps)
    assert {row for rows in steps for row in rows} == {0, 3, 6, 9}


def test_only_a_few_steps_are_fetched_ahead_in_a_thread_that_ends_with_the_consumer():
    made: list[str] = []

    def slow(rows, *, dummy_rows=0):
        made.append(threading.current_thread().name)
        time.sleep(0.02)
        return _collate(rows, dummy_rows=dummy_rows)

    before, loader = set(threading.enumerate()), _loader(100, StepShape(1, 1), collate=slow)
    steps, began = loader.iterate(0, 90), time.perf_counter()
    next(steps)
    assert 0.02 < loader.waited_s <= time.perf_counter() - began
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


def test_training_and_evaluating_need_rows():
    with pytest.raises(DataError, match="training split has no rows"):
        _loader(0, StepShape(1, 1))
    with pytest.raises(DataError, match="cannot evaluate on a split that has no rows"):
        next(evaluation_batches(_numbered(0), _collate, batch_size=2, rank=0, world=1))


@given(count=COUNTS, batch_size=SMALL, world=SMALL)
@settings(max_examples=30)
def test_all_ranks_together_meet_every_row_once_in_as_many_batches_each(count, batch_size, world):
    rows = _numbered(count)
    ranks = [
        list(evaluation_batches(rows, _collate, batch_size=batch_size, rank=rank, world=world))
        for rank in range(world)
    ]

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
    assert rows == [
        list(range(start, min(start + batch_size, count))) for start in range(0, count, batch_size)
    ]
