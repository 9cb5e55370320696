"""Distribution of rows to steps, ranks and micro-batches: a function of (seed, step), no state.

Shapes: B rows of a micro-batch, T positions.
"""

from __future__ import annotations

import heapq
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megakd.data.arrow import arrow_batches, column_of
from megakd.data.batch import IGNORE, ROUTE, Batch, BatchSource, teacher_number
from megakd.data.chat_tokens import PROMPT_LENGTH
from megakd.data.collation import Collator, Masking, documents_of, padded_width
from megakd.errors import DataError, MegakdError


class StepShape(NamedTuple):
    """Numbers of rows, micro-batches and ranks of an optimizer step.

    per_device: rows of a micro-batch.
    accumulation: micro-batches of a rank per step.
    """

    per_device: int
    accumulation: int
    rank: int = 0
    world: int = 1

    @staticmethod
    def of_batch(batch_size: int, most: int, *, rank: int, world: int) -> StepShape:
        """Return the shape that splits a global batch evenly into micro-batches.

        They have at most `most` rows, of which the last may be a dummy row.
        """
        accumulation = -(-batch_size // (most * world))
        return StepShape(-(-batch_size // (accumulation * world)), accumulation, rank, world)

    @property
    def micro_batches(self) -> range:
        """The numbers of this rank's micro-batches among the micro-batches of all ranks."""
        return range(self.rank, self.accumulation * self.world, self.world)

    @property
    def rows_per_step(self) -> int:
        return self.per_device * self.accumulation * self.world

    def most_rows(self, rows: int) -> int:
        """Return the rows of a micro-batch if a step has at most `rows`, to save dummy rows."""
        return min(self.per_device, -(-rows // (self.accumulation * self.world)))

    def steps_per_epoch(self, rows: int) -> int:
        return -(-rows // self.rows_per_step)


class Part(NamedTuple):
    """The rows of a micro-batch among those of its step, and the teacher that all of them name."""

    rows: NDArray[np.int64]
    teacher: str | None = None


class StepLayout(NamedTuple):
    """Distribution of the rows of an optimizer step over micro-batches.

    shape: number of rows of a step. Without `tokens_per_rank`, also the numbers of micro-batches
        and of their rows.
    tokens_per_rank: the most tokens of a micro-batch, which is then one packed row. The number of
        micro-batches may differ between steps. None: micro-batches of padded rows.
    teachers: the teachers that rows name. A micro-batch then has the rows of one teacher, the same
        on all ranks, so that a step has more micro-batches of fewer rows.
    by_length: padded rows of like lengths share a micro-batch.
    """

    shape: StepShape
    tokens_per_rank: int | None = None
    teachers: tuple[str, ...] = ()
    by_length: bool = False

    def micro_batches(
        self, lengths: NDArray[np.int64], routes: NDArray[np.int64] | None = None
    ) -> list[Part]:
        """Return the rows of every micro-batch of this rank, equally many per rank.

        Args:
            lengths: [N] tokens of every row of the step, the same on all ranks.
            routes: [N] numbers of the teachers that the rows name, if the layout has `teachers`.
        """
        if not self.teachers:
            return list(map(Part, self._split(lengths, self.shape.accumulation)))
        parts: list[Part] = []
        for name in self.teachers:
            mine = np.flatnonzero(routes == teacher_number(name))
            count = -(-len(mine) // (self.shape.per_device * self.shape.world))
            if count:
                parts += (Part(mine[rows], name) for rows in self._split(lengths[mine], count))
        return parts

    def _split(self, lengths: NDArray[np.int64], count: int) -> list[NDArray[np.int64]]:
        # `count` micro-batches of padded rows, or as many packed rows as needed.
        rank, world = self.shape.rank, self.shape.world
        if self.tokens_per_rank is not None:
            return _budgeted(lengths, self.tokens_per_rank, ranks=world)[rank::world]
        parts = count * world
        if self.by_length:  # the ranks have rows of like lengths at the same time
            order = np.argsort(lengths, kind="stable")
            return [np.sort(part) for part in np.array_split(order, parts)[rank::world]]
        return [np.arange(number, len(lengths), parts) for number in range(rank, parts, world)]

    def most_micro_batches(self, longest: int) -> int:
        """Return the largest number of micro-batches of a rank in a step."""
        if self.tokens_per_rank is None:
            return self.shape.accumulation
        # When a row does not fit, every micro-batch has as many rows as of the longest rows fit.
        rows = max(1, self.tokens_per_rank // longest)
        return -(-self.shape.rows_per_step // (rows * self.shape.world))


def collate_step(
    rows: object,
    layout: StepLayout,
    collate: Collator,
    *,
    routes: NDArray[np.int64] | None = None,
) -> tuple[Batch, ...]:
    """Return this rank's micro-batches of a step.

    `rows` is an arrow table or a mapping of columns with ALL rows of the step, in order, the same
    on all ranks, and `routes` are as in `StepLayout.micro_batches`. A micro-batch without rows has
    all their columns, so that no rank branches on them alone.
    """
    table: Any = rows if isinstance(rows, pa.Table) else pa.table(cast("Any", rows))
    lengths = row_lengths(table)
    size = layout.shape.most_rows(len(lengths))
    return tuple(
        micro_batch(table.take(part.rows), part, layout, collate, size=size)
        for part in layout.micro_batches(lengths, routes)
    )


def micro_batch(
    rows: object, part: Part, layout: StepLayout, collate: Collator, *, size: int
) -> Batch:
    """Return one micro-batch of the rows of a part, packed if the layout says so.

    Other micro-batches have dummy rows up to `size`, or at least one row if the rows name a
    teacher. Without rows, nothing is valid.
    """
    count = len(part.rows)
    if part.teacher is not None or layout.tokens_per_rank is not None:
        size = max(count, 1)
    batch = collate(rows, dummy_rows=size - count)
    if layout.tokens_per_rank is not None:
        batch = packed_row(batch, most=layout.tokens_per_rank)
    return batch if part.teacher is None else batch._replace(teacher=part.teacher)


def packed_row(batch: Batch, *, most: int) -> Batch:
    """Return the valid positions of all rows as one row, [1, T].

    Positions restart with every row, and wherever they restarted in a row. T is a multiple of 8,
    but at most `most`; padding at the end is a document of its own.
    """
    count = int(batch.valid.sum())
    padding = padded_width(count, most) - count

    def flat(values: Tensor, fill: int) -> Tensor:
        return functional.pad(values[batch.valid], (0, padding), value=fill)[None]

    given = batch.inputs["position_ids"][batch.valid]
    positions = torch.cat([given, torch.arange(padding)])[None]
    return Batch(
        {"input_ids": flat(batch.inputs["input_ids"], 0), "position_ids": positions},
        flat(batch.labels, IGNORE),
        flat(batch.valid, 0),
        documents=documents_of(positions.numpy()),
    )


def row_lengths(rows: pa.Table) -> NDArray[np.int64]:
    """Return [N] tokens of every row, without reading the tokens."""
    column = cast("Any", rows).column("input_ids")  # pyarrow carries no types
    return cast("Any", pc).list_value_length(column).to_numpy().astype(np.int64)


def _budgeted(lengths: NDArray[np.int64], budget: int, *, ranks: int) -> list[NDArray[np.int64]]:
    # The longest rows first, each to the micro-batch with the fewest tokens; more micro-batches, a
    # multiple of the ranks, until none exceeds the budget. Micro-batch k belongs to rank k modulo
    # `ranks`; some may have no row.
    if len(lengths) and lengths.max() > budget:
        raise DataError(
            f"train.tokens_per_rank is {budget}, and a training row has {lengths.max()} tokens; "
            "raise train.tokens_per_rank, or shorten the rows (task.max_length, or generated texts)"
        )
    longest_first = np.argsort(-lengths, kind="stable").tolist()
    count = max(1, -(-int(lengths.sum()) // (budget * ranks))) * ranks
    while True:
        loads, rows = [(0, number) for number in range(count)], [list[int]() for _ in range(count)]
        for row in longest_first:
            load, number = loads[0]
            heapq.heapreplace(loads, (load + int(lengths[row]), number))
            rows[number].append(row)
        if max(loads)[0] <= budget:
            break
        count += ranks
    # Micro-batches that run at the same time are about equally long; the longest of them goes to
    # the first and the last rank by turns.
    dealt = np.array([number for _, number in sorted(loads, reverse=True)]).reshape(-1, ranks)
    dealt[1::2] = dealt[1::2, ::-1]
    return [np.sort(np.array(rows[number], dtype=np.int64)) for number in dealt.ravel()]


STEPS_AHEAD, STEPS_AT_ONCE = 2, 4

LENGTHS_AT_ONCE = 100_000

T = TypeVar("T")


OtherReading = Callable[..., Batch]
"""Encodes rows for a model with another tokenizer: `read(rows, numbers, size=, seed=, draw=)` gives
the micro-batch of `size` rows, dummy rows last. `numbers` are those of the rows in the data set,
`draw` is that of the pass over the data."""


class RowOrder:
    """The numbers of the rows of each step, over all ranks: a function of (seed, step)."""

    def __init__(self, rows: NDArray[np.int64], shape: StepShape, *, seed: int) -> None:
        def order(epoch: int) -> NDArray[np.int64]:
            return rows[np.random.default_rng([seed, epoch]).permutation(len(rows))]

        self._order, self._size = lru_cache(maxsize=1)(order), shape.rows_per_step
        self.steps_per_epoch = shape.steps_per_epoch(len(rows))

    def __call__(self, step: int) -> NDArray[np.int64]:
        """Return the row numbers of a step, counted from 0 over all epochs; see `StepLoader`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._order(epoch)[position * self._size : (position + 1) * self._size]


class StepLoader(BatchSource):
    """The training rows, grouped by optimizer step.

    Every epoch is a new permutation of the rows, cut into steps of `rows_per_step`. The rows of a
    step do not depend on the split into micro-batches and ranks. The last step of an epoch has the
    remaining rows, which are distributed evenly and filled up with dummy rows. No row occurs twice
    in an epoch, and every rank has the same number of micro-batches in every step. With
    `tokens_per_rank`, the same rows are packed by their lengths, and are not numbered.

    `masking` chooses new masks in every epoch, as a function of (seed, epoch, row). `others` encode
    the same rows for models with another tokenizer, by role. Prompts without an answer, from which
    nothing can be learned, are left out.
    """

    def __init__(
        self,
        rows: Dataset,
        collate: Collator,
        *,
        layout: StepLayout,
        seed: int,
        masking: Masking | None = None,
        others: Mapping[str, OtherReading] = MappingProxyType({}),
    ) -> None:
        learned = rows_with_targets(rows)
        if not len(learned):
            raise DataError("the training split has no rows to learn from")
        # Arrow tables do not create a Python object per token.
        self._rows = rows.with_format("arrow")
        self._collate, self._layout = collate, layout
        reads_lengths = layout.by_length or layout.tokens_per_rank is not None
        self._lengths = lengths_of_rows(rows) if reads_lengths else None
        self._size = layout.shape.most_rows(len(learned))
        self._routes = column_of(rows, ROUTE) if layout.teachers else None
        self.step_rows = RowOrder(learned, layout.shape, seed=seed)
        self.steps_per_epoch = self.step_rows.steps_per_epoch
        self.waited_s = 0.0
        """Seconds that the consumers of `iterate` spent waiting for data."""
        self._seed = seed
        self._masking, self._others = masking, others

    def step(self, index: int) -> tuple[Batch, ...]:
        """Return this rank's micro-batches of step `index`, counted from 0 over all epochs."""
        rows = self.step_rows(index)
        # Else only the number of rows counts.
        lengths = np.zeros_like(rows) if self._lengths is None else self._lengths[rows]
        routes = None if self._routes is None else self._routes[rows]
        parts = self._layout.micro_batches(lengths, routes)
        return tuple(self._micro_batch(index, rows[part.rows], part) for part in parts)

    def iterate(self, start: int, stop: int) -> Generator[tuple[Batch, ...], None, None]:
        steps = (partial(self.step, index) for index in range(start, stop))
        with closing(made_ahead(steps)) as futures:
            for step in futures:
                yield awaited(step, self)

    def _micro_batch(self, index: int, mine: NDArray[np.int64], part: Part) -> Batch:
        rows = _taken(self._rows, mine)
        batch = micro_batch(rows, part, self._layout, self._collate, size=self._size)
        if self._layout.tokens_per_rank is not None:
            return batch
        draw = index // self.steps_per_epoch
        if self._masking is not None:
            batch = self._masking(batch, mine, seed=self._seed, draw=draw)
        others: dict[str, Batch] = {}
        for role, read in self._others.items():
            seed = zlib.crc32(f"{self._seed}:{role}".encode())
            others[role] = read(rows, mine, size=self._size, seed=seed, draw=draw)
        numbers = np.full(len(batch.valid), -1)
        numbers[: len(mine)] = mine
        return batch._replace(rows=torch.from_numpy(numbers), others=others or None)


def rows_with_targets(rows: Dataset) -> NDArray[np.int64]:
    """Return the numbers of the rows in which a token counts: all but prompts without an answer."""
    if PROMPT_LENGTH not in rows.column_names:
        return np.arange(len(rows))
    return np.flatnonzero(prompt_lengths(rows) < lengths_of_rows(rows))


def prompt_lengths(rows: Dataset) -> NDArray[np.int64]:
    """Return [N] tokens of the prompt of every row; 0: the row has no prompt."""
    return column_of(rows, PROMPT_LENGTH).astype(np.int64)


def lengths_of_rows(rows: Dataset) -> NDArray[np.int64]:
    """Return [N] tokens of every row, from the offsets of the arrow files."""
    tables = arrow_batches(rows.select_columns("input_ids"), LENGTHS_AT_ONCE)
    # A stream has no rows here, and so no tables.
    return np.concatenate([np.zeros(0, np.int64), *map(row_lengths, tables)])


def evaluation_batches(
    rows: Dataset,
    collate: Collator,
    *,
    batch_size: int,
    rank: int,
    world: int,
    masking: Masking | None = None,
) -> Iterator[Batch]:
    """Yield this rank's batches of an evaluation, in which every row occurs once.

    Every rank has the same number of batches. Global batch k holds the rows from k·batch_size, in
    order, and belongs to rank k modulo world; dummy rows fill the last batches. `masking` masks the
    same tokens in every evaluation of every run.
    """
    batch_size = min(batch_size, len(rows))
    batch_of = _evaluated(rows, collate, masking, size=batch_size)
    for turn in range(-(-len(rows) // (batch_size * world))):
        start = (turn * world + rank) * batch_size
        yield batch_of(np.arange(start, min(start + batch_size, len(rows))))


def global_batches(
    rows: Dataset,
    collate: Collator,
    *,
    shape: StepShape,
    batch_size: int,
    masking: Masking | None = None,
) -> Iterator[Iterator[Batch]]:
    """Yield this rank's micro-batches of every global batch, in order.

    The rows of a batch do not depend on the split into micro-batches and ranks. Every rank has the
    same number of micro-batches in every batch; dummy rows fill the micro-batches. `masking` masks
    the same tokens as in an evaluation.
    """
    batch_of = _evaluated(rows, collate, masking, size=shape.most_rows(len(rows)))
    for start in range(0, len(rows), batch_size):
        batch = np.arange(start, min(start + batch_size, len(rows)))
        parts = [batch[n :: shape.accumulation * shape.world] for n in shape.micro_batches]
        yield map(batch_of, parts)


def _evaluated(
    rows: Dataset, collate: Collator, masking: Masking | None, *, size: int
) -> Callable[[NDArray[np.int64]], Batch]:
    # Returns a function of row numbers, which masks the same tokens every time.
    if not len(rows):
        raise DataError(
            "cannot evaluate on a split that has no rows; with task.streaming only the held-out "
            "splits have rows"
        )
    table = rows.with_format("arrow")

    def batch_of(numbers: NDArray[np.int64]) -> Batch:
        batch = collate(_taken(table, numbers), dummy_rows=size - len(numbers))
        return batch if masking is None else masking(batch, numbers, seed=0, draw=0)

    return batch_of


def _taken(table: Dataset, rows: NDArray[np.int64]) -> object:
    # No rows of several labels still tell the number of classes.
    return table[rows] if len(rows) or "label" in table.column_names else {}


def awaited(future: Future[T], source: BatchSource) -> T:
    """Return the result of a future, and count the seconds that a source waits for it."""
    began = time.perf_counter()
    try:
        return future.result()
    except MegakdError as error:
        error.of_one_rank = True  # every rank reads rows of its own
        raise
    finally:
        source.waited_s += time.perf_counter() - began


def made_ahead(
    tasks: Iterable[Callable[[], T]], ahead: int = STEPS_AHEAD
) -> Generator[Future[T], None, None]:
    """Yield the result of each task, in order, while a thread runs the next `ahead` tasks.

    The thread gets a few tasks at a time: between two operations of a model it has to wait for
    the interpreter and for memory that the model has put out of the caches. It ends with the
    generator. The result of a future raises the error of its task.
    """
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader")
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(executor.submit(task))
            if len(waiting) == ahead + STEPS_AT_ONCE:
                yield from (waiting.popleft() for _ in range(STEPS_AT_ONCE))
        yield from waiting
    finally:
        executor.shutdown(cancel_futures=True)
