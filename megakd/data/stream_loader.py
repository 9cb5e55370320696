"""Distribution of a stream of texts to steps, ranks and micro-batches, with an exact position.

A reader reads its share of the texts in blocks, encodes a block, and shuffles the rows of the
block; a rank fills its micro-batches with the rows. A position names a block by the place in the
files where it begins, so that a resumed run encodes only this block again. A run has a reader per
rank, and keeps its readers: of fewer ranks, each continues several.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice, repeat
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset
from numpy.typing import NDArray

from megakd.contract.batch import Batch, BatchSource
from megakd.data.chat.conversations import CONVERSATION, is_chat
from megakd.data.chat.tokens import ChatEncoder, tables_of_conversations
from megakd.data.collation import Collator
from megakd.data.encoding import StreamedRows
from megakd.data.loader import awaited, made_ahead
from megakd.data.masking import Masking
from megakd.data.step_layout import StepShape, check_shares
from megakd.data.token_tables import tables_of_texts
from megakd.errors import DataError

logger = logging.getLogger(__name__)
BLOCK_CHARACTERS = 1_000_000
"""A block has at least this many characters, unless the texts end."""
CHARACTERS_PER_LENGTH = 128
"""A block also has this many characters per token of `max_length`, which is about 32 packed rows.
The last row of a block of causal_lm is shorter than the others."""
BLOCKS_AHEAD = 1
READERS = "readers"
"""Key of the state with the positions of all readers."""
Parts = list[tuple[pa.Table, int]]
"""Parts of blocks, with the epoch of each part."""


class Position(NamedTuple):
    """The place of a reader in its share of a stream.

    epoch: how often the reader has read its share to the end.
    block: number of the block in the epoch.
    files: state of the `datasets` stream at the beginning of the block; None at the beginning.
    taken: number of the block's rows that earlier steps have used.
    """

    epoch: int = 0
    block: int = 0
    files: Mapping[str, Any] | None = None
    taken: int = 0


class EncodedStream:
    """The encoded rows of one reader's share of a stream, without end.

    characters: the smallest number of characters of a block; None: see `BLOCK_CHARACTERS`.
    """

    def __init__(
        self, rows: StreamedRows, *, shape: StepShape, seed: int, characters: int | None = None
    ) -> None:
        self.shape, self.seed, self.name = shape, seed, rows.texts.table.name
        self.reader, self.total = shape.rank, shape.world
        self._stream, self._tokenizer, self._task = rows
        self.bad = rows.texts.bad
        least = max(BLOCK_CHARACTERS, CHARACTERS_PER_LENGTH * rows.task.row_length)
        self._characters = characters or least

    def readers(self, total: int) -> Sequence[EncodedStream]:
        """Return the readers of this rank, where `total` read on all ranks."""
        each = total // self.shape.world
        readers = [copy.copy(self) for _ in range(each)]
        for number, reader in enumerate(readers, start=each * self.shape.rank):
            reader.reader, reader.total = number, total
        return readers

    def parts(self, position: Position) -> Generator[tuple[Parts, Position], None, None]:
        """Yield parts of blocks with the reader's rows of a step, and the position after them."""
        parts: Parts = []
        missing = size = self.shape.rows_per_step // self.total
        blocks = self._blocks(position)
        tasks = repeat(partial(next, blocks))
        with closing(blocks), closing(made_ahead(tasks, BLOCKS_AHEAD, at_once=1)) as futures:
            for future in futures:
                rows, place = future.result()
                used = place.taken
                while used < len(rows):
                    part = rows.slice(used, missing)
                    parts.append((part, place.epoch))
                    used, missing = used + len(part), missing - len(part)
                    if missing == 0:
                        yield parts, place._replace(taken=used)
                        parts, missing = [], size

    def _blocks(self, position: Position) -> Generator[tuple[pa.Table, Position], None, None]:
        # The encoded and shuffled rows of each block; the position is that of the first row to use.
        while True:
            has_rows = position.block > 0
            share = self._stream.share(self.reader, self.total)
            if position.files is not None:
                share.load_state_dict(dict(position.files))
            raw = iter(share)
            while texts := self._texts(raw):
                rows = self._encoded(texts, position)
                if rows is not None:
                    has_rows = True
                    yield rows, position
                position = Position(position.epoch, position.block + 1, share.state_dict())
            if not has_rows:
                raise DataError(
                    f"{self.name} has no text for rank {self.reader} of {self.total}: every rank "
                    "needs at least one text with tokens; use more texts or fewer ranks"
                )
            position = Position(position.epoch + 1)

    def _texts(self, raw: Iterator[Mapping[str, object]]) -> list[dict[str, str]]:
        rows: list[dict[str, str]] = []
        characters = 0
        try:
            for row in filter(None, map(self._stream.row, raw)):
                rows.append(row)
                # Positions in streams that are read already depend on this.
                characters += len(row.get(CONVERSATION, row["text"]))
                if characters >= self._characters:
                    break
        except OSError as error:
            raise DataError(
                f"{self.name} cannot be read any further: {error}; start the same command again to "
                "continue from the last checkpoint"
            ) from error
        return rows

    def _encoded(self, texts: list[dict[str, str]], position: Position) -> pa.Table | None:
        rows = Dataset.from_list(texts)
        if is_chat(rows):
            encoder = ChatEncoder(self._tokenizer, self._task, bad=self.bad)
            made = tables_of_conversations(
                rows, encoder, name=self.name, counts={}, beside_training=True
            )
        else:
            made = tables_of_texts(rows, self._tokenizer, self._task)
        if not (tables := list(made)):
            return None
        table = cast("Any", pa).concat_tables(tables)  # pyarrow carries no types
        order = np.random.default_rng([self.seed, position.epoch, position.block])
        return table.take(order.permutation(len(table)))


class StreamLoader(BatchSource):
    """The rows of a stream, grouped by optimizer step.

    Every step has `rows_per_step` rows, without dummy rows, and every rank has the same number of
    micro-batches. A reader that has read its share starts its share again.

    `masking` chooses new masks every time that a text is read, as a function of (seed, epoch,
    tokens of the row): the rows of a stream have no numbers.
    """

    def __init__(
        self,
        rows: EncodedStream,
        collate: Collator,
        *,
        steps_per_epoch: int,
        gather: Callable[[Any], list[Any]],
        masking: Masking | None = None,
    ) -> None:
        self._rows, self._collate, self._masking = rows, collate, masking
        self._gather = gather
        self.steps_per_epoch = steps_per_epoch
        """Steps that the log counts as one epoch, because the length of a stream is unknown."""
        self.waited_s = 0.0
        """Seconds that the consumers of `iterate` spent waiting for data."""
        self._readers = rows.readers(rows.total)
        self._step, self._positions = 0, [Position()] * len(self._readers)
        # Rows that were read before are not of this loader.
        self._bad_before, self._bad_told = rows.bad.count, 0

    def iterate(self, start: int, stop: int) -> Generator[Sequence[Batch], None, None]:
        """Yield the steps from `start` up to, excluding, `stop`, prepared in a background thread.

        The texts of steps before `start` are read and dropped if neither a checkpoint nor an
        earlier call gives the position of a step up to `start`.
        """
        if self._step > start:
            self._step, self._positions = 0, [Position()] * len(self._readers)
        if start > self._step:
            logger.info("reading the texts of %d earlier steps again", start - self._step)
        steps = self._steps(self._positions, skip=start - self._step)
        tasks = (partial(next, steps) for _ in range(start, stop))
        with closing(steps), closing(made_ahead(tasks)) as futures:
            for step, future in enumerate(futures, start=start + 1):
                batches, positions = awaited(future, self)
                epoch = positions[0].epoch
                if self._rows.shape.rank == 0 and epoch > self._positions[0].epoch:
                    logger.info(
                        "%s: rank 0 has read its texts %d time(s) and starts again",
                        *(self._rows.name, epoch),
                    )
                # Of the step that is used, not of the steps that are prepared.
                self._step, self._positions = step, positions
                yield batches

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all readers after the last step of `iterate`; a collective."""
        places = [position._asdict() for position in self._positions]
        of_ranks = self._gather((places, self._rows.bad.count - self._bad_before))
        bad = sum(bad for _, bad in of_ranks)
        if bad > self._bad_told:
            logger.warning(
                "%s: all ranks left out %d bad row(s) so far, in all epochs (task.bad_rows: drop)",
                *(self._rows.name, bad),
            )
        self._bad_told = bad
        return {"step": self._step, READERS: [place for places, _ in of_ranks for place in places]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        places = state[READERS]
        check_shares(len(places), self._rows.shape.world, where="the run")
        self._readers = self._rows.readers(len(places))
        self._step = state["step"]
        self._positions = [Position(**places[each.reader]) for each in self._readers]

    def _steps(
        self, positions: Sequence[Position], *, skip: int
    ) -> Generator[tuple[Sequence[Batch], list[Position]], None, None]:
        with ExitStack() as stack:
            streams = [
                stack.enter_context(closing(reader.parts(position)))
                for reader, position in zip(self._readers, positions, strict=True)
            ]
            for of_readers in islice(zip(*streams, strict=True), skip, None):
                parts = [part for parts, _ in of_readers for part in parts]
                rows = cast("Any", pa).concat_tables([part for part, _ in parts])
                epochs = np.concatenate([np.full(len(part), epoch) for part, epoch in parts])
                yield tuple(self._micro_batches(rows, epochs)), [after for _, after in of_readers]

    def _micro_batches(self, rows: pa.Table, epochs: NDArray[np.int64]) -> Iterator[Batch]:
        size = self._rows.shape.per_device
        for start in range(0, len(rows), size):
            mine = cast("Any", rows).slice(start, size)
            batch = self._collate(mine)
            if self._masking is not None:
                # Instead of its number, a number below 2^63 that depends only on the row's tokens.
                tokens = (ids.values.to_numpy().tobytes() for ids in mine.column("input_ids"))
                digests = (hashlib.blake2b(row, digest_size=8).digest() for row in tokens)
                hashes = np.array([int.from_bytes(d, "little") >> 1 for d in digests], np.int64)
                draw = epochs[start : start + size]
                batch = self._masking(batch, hashes, seed=self._rows.seed, draw=draw)
            yield batch
