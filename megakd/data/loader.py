"""Which rows a rank sees at which step: a function of (seed, step), with nothing to restore."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from megakd.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from datasets import Dataset
    from numpy.typing import NDArray

    from megakd.contract.batch import Batch
    from megakd.data.masking import Masking

STEPS_AHEAD = 2


class Collate(Protocol):
    """Makes a padded micro-batch of rows; `dummy_rows` more at the end count nowhere."""

    def __call__(self, rows: object, *, dummy_rows: int = 0) -> Batch:
        """Pads and joins."""
        ...


class StepShape(NamedTuple):
    """How the rows of an optimiser step are dealt out.

    per_device: rows of a micro-batch; accumulation: micro-batches of a rank per step.
    """

    per_device: int
    accumulation: int
    rank: int = 0
    world: int = 1

    @staticmethod
    def of_batch(batch_size: int, most: int, *, rank: int, world: int) -> StepShape:
        """Return the shape that deals a batch of all ranks evenly, at most `most` rows at a time.

        The last row of the last micro-batches may be a dummy.
        """
        accumulation = -(-batch_size // (most * world))
        return StepShape(-(-batch_size // (accumulation * world)), accumulation, rank, world)

    @property
    def micro_batches(self) -> range:
        """The numbers of this rank's micro-batches among those of all ranks."""
        return range(self.rank, self.accumulation * self.world, self.world)

    @property
    def rows_per_step(self) -> int:
        """Over all ranks and micro-batches."""
        return self.per_device * self.accumulation * self.world

    def most_rows(self, rows: int) -> int:
        """Return the rows of a micro-batch where a step has at most `rows`: no need for dummies."""
        return min(self.per_device, -(-rows // (self.accumulation * self.world)))

    def steps_per_epoch(self, rows: int) -> int:
        """Steps in which every row comes once."""
        return -(-rows // self.rows_per_step)


class StepLoader:
    """The training rows, an optimiser step at a time.

    Every epoch is a fresh permutation of the rows, cut into steps of `rows_per_step`. Which
    rows form a step does not depend on how they are dealt to micro-batches and ranks. The last
    step of an epoch has what is left, dealt evenly and filled up with dummy rows: no row comes
    twice, and every rank has the same number of micro-batches in every step.

    masking hides tokens of each row anew in every epoch, a function of (seed, epoch, row).
    """

    def __init__(
        self,
        rows: Dataset,
        collate: Collate,
        *,
        shape: StepShape,
        seed: int,
        masking: Masking | None = None,
    ) -> None:
        if not len(rows):
            raise DataError("the training split has no rows")
        # Arrow tables: no Python object per token is made.
        self._rows = rows.with_format("arrow")
        self._collate = collate
        self._shape = shape
        self._size = shape.most_rows(len(rows))
        self.steps_per_epoch = shape.steps_per_epoch(len(rows))
        self.waited_s = 0.0
        """Seconds that the consumers of `iterate` spent waiting for data."""
        self._seed = seed
        self._masking = masking
        self._latest: tuple[int, NDArray[np.int64]] | None = None

    def step(self, index: int) -> tuple[Batch, ...]:
        """This rank's micro-batches of optimiser step `index`, counted from 0 over all epochs."""
        return tuple(self._micro_batch(index, number) for number in self._shape.micro_batches)

    def step_rows(self, index: int) -> NDArray[np.int64]:
        """The rows of optimiser step `index` over all ranks."""
        epoch, position = divmod(index, self.steps_per_epoch)
        start = position * self._shape.rows_per_step
        return self._order(epoch)[start : start + self._shape.rows_per_step]

    def iterate(self, start: int, stop: int) -> Generator[tuple[Batch, ...], None, None]:
        """The steps from `start` up to `stop`, fetched ahead in one background thread.

        The thread ends when the iterator does, also when the consumer leaves early; an error in
        it is raised here.
        """
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader")
        ahead: deque[Future[tuple[Batch, ...]]] = deque()
        try:
            for index in range(start, stop + STEPS_AHEAD):
                if index < stop:
                    ahead.append(executor.submit(self.step, index))
                if index >= start + STEPS_AHEAD:
                    yield self._awaited(ahead.popleft())
        finally:
            executor.shutdown(cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the rows of a step follow from the seed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""

    def _order(self, epoch: int) -> NDArray[np.int64]:
        # Kept for the epoch; replaced in one assignment, since two threads may be here.
        latest = self._latest
        if latest is None or latest[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._latest = latest = (epoch, generator.permutation(len(self._rows)))
        return latest[1]

    def _micro_batch(self, index: int, number: int) -> Batch:
        shape = self._shape
        mine = self.step_rows(index)[number :: shape.accumulation * shape.world]
        batch = _collated(self._rows, mine, self._collate, size=self._size)
        if self._masking is not None:
            draw = index // self.steps_per_epoch
            batch = self._masking(batch, mine, seed=self._seed, draw=draw)
        numbers = np.full(self._size, -1)
        numbers[: len(mine)] = mine
        return batch._replace(rows=torch.from_numpy(numbers))

    def _awaited(self, step: Future[tuple[Batch, ...]]) -> tuple[Batch, ...]:
        began = time.perf_counter()
        try:
            return step.result()
        finally:
            self.waited_s += time.perf_counter() - began


def evaluation_batches(
    rows: Dataset,
    collate: Collate,
    *,
    batch_size: int,
    rank: int,
    world: int,
    masking: Masking | None = None,
) -> Iterator[Batch]:
    """This rank's share of all rows, each row once, as many batches on every rank.

    Global batch k holds rows k·batch_size and on, in order, and goes to rank k modulo world;
    dummy rows fill the last ones. `masking` hides the same tokens at every evaluation of every run.

    Raises:
        DataError: there are no rows.
    """
    _check_rows(rows)
    table, batch_size = rows.with_format("arrow"), min(batch_size, len(rows))
    for turn in range(evaluation_turns(len(rows), batch_size=batch_size, world=world)):
        start = (turn * world + rank) * batch_size
        end = min(start + batch_size, len(rows))
        numbers = np.arange(start, end)
        batch = _collated(table, numbers, collate, size=batch_size)
        yield batch if masking is None else masking(batch, numbers, seed=0, draw=0)


def global_batches(
    rows: Dataset,
    collate: Collate,
    *,
    shape: StepShape,
    batch_size: int,
    masking: Masking | None = None,
) -> Iterator[Iterator[Batch]]:
    """Yield this rank's micro-batches of every batch of all rows, in order.

    Which rows form a batch does not depend on how they are dealt to micro-batches and ranks.
    Every rank has the same number of micro-batches in every batch; dummy rows fill them.
    `masking` hides the same tokens as at an evaluation.

    Args:
        rows: all of them come once.
        collate: makes a micro-batch.
        shape: how a batch is dealt, see `StepShape.of_batch`.
        batch_size: rows of a batch, all ranks together.
        masking: for mlm.

    Raises:
        DataError: there are no rows.
    """
    _check_rows(rows)
    table = rows.with_format("arrow")

    def micro_batch(batch: NDArray[np.int64], number: int) -> Batch:
        mine = batch[number :: shape.accumulation * shape.world]
        made = _collated(table, mine, collate, size=shape.most_rows(len(rows)))
        return made if masking is None else masking(made, mine, seed=0, draw=0)

    for start in range(0, len(rows), batch_size):
        batch = np.arange(start, min(start + batch_size, len(rows)))
        yield (micro_batch(batch, number) for number in shape.micro_batches)


def _check_rows(rows: Dataset) -> None:
    if not len(rows):
        raise DataError("cannot evaluate on a split that has no rows")


def _collated(table: Dataset, rows: NDArray[np.int64], collate: Collate, *, size: int) -> Batch:
    return collate(table[rows] if len(rows) else {}, dummy_rows=size - len(rows))


def evaluation_turns(count: int, *, batch_size: int, world: int) -> int:
    """How many batches every rank gets for `count` rows."""
    return -(-count // (batch_size * world))
