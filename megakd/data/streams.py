"""Training texts that are read, encoded and shuffled while a run learns them: `task.streaming`.

`datasets` reads the share of each rank and says where a rank is. A rank reads its share in blocks,
encodes a block, shuffles the rows of the block, and fills its micro-batches with them. A place
names a block by the state of the share at its beginning, so that a resumed run encodes only this
block again. The buffer of a shuffled `IterableDataset` is not in its state, so it is not used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from megakd.config.task import TaskConfig
from megakd.contract.batch import Batch, BatchSource
from megakd.data.arrow import BadRows, Record, SplitName, Table, key_of
from megakd.data.chat.conversations import CONVERSATION, is_chat
from megakd.data.chat.tokens import ChatEncoder, tables_of_conversations
from megakd.data.choosing import prompt_keys
from megakd.data.collation import Collator
from megakd.data.files import known_suffix, split_files, tables_of_files
from megakd.data.hub import hub_errors, splits_of
from megakd.data.loader import awaited, made_ahead
from megakd.data.masking import Masking
from megakd.data.readers import records_of, table_of, typed_table, untyped
from megakd.data.rows import (
    DEFAULT_METRICS,
    ERROR,
    VERSION,
    Corpus,
    RowKind,
    StreamedRows,
    TextStream,
    rows_of,
)
from megakd.data.step_layout import StepShape, row_lengths
from megakd.data.token_tables import tables_of_texts
from megakd.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
BLOCK_CHARACTERS, CHARACTERS_PER_LENGTH = 1_000_000, 128
"""The least characters of a block, and per token of `max_length`: about 32 packed rows, of which
the last is shorter than the others."""
EPOCH = "epoch"


def streamed_files(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return a stream of local files, in their order, and the rows of the held-out files."""
    paths, setting = split_files(task)
    key = setting.format(split="train")
    files = paths.pop("train")
    for path in files:
        if known_suffix(path, key) == ".json":
            raise DataError(
                f"{key}: {path} is a json file, which can only be read whole, and task.streaming "
                "is true; write one object per line and name the file .jsonl"
            )
    table = table_of(files, task.data_name, is_streamed=True)
    kind = RowKind.of(task, table)
    # `datasets` gives each rank a part of what is in a list, so that a list holds only the files.
    rows = IterableDataset.from_generator(
        _rows, gen_kwargs={"paths": [*map(str, files)], "kind": kind}
    )
    stream = TextStream(name=task.data_name, rows=rows, kind=kind)
    digests = [kind.columns, table.digest]
    return _corpus(stream, digests, tables_of_files(paths, setting), task, cache_dir=cache_dir)


def streamed_hub_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return a stream of the Hub data set `task.dataset`, and the rows of its held-out splits.

    These are the first `task.max_eval_examples` rows of a split.
    """
    name, most = task.data_name, task.max_eval_examples
    with hub_errors(name, task.dataset_config) as label:
        builder = datasets.load_dataset_builder(name, task.dataset_config, revision=task.revision)
        streams = cast("Mapping[str, IterableDataset]", builder.as_streaming_dataset())
        keys = task.splits or splits_of([*streams], label)
        for split, key in keys.items():
            if key not in streams:
                raise DataError(
                    f"task.splits.{split}: the Hub data set {label} has no split {key!r}, and a "
                    f"stream reads no part of one; its splits are {', '.join(streams)}"
                )
        files = str(builder.config.data_files and dict(builder.config.data_files))
        tables: dict[SplitName, Table] = {}
        for split, key in keys.items():
            rows = streams[key]
            digest = key_of(name, task.dataset_config, builder.hash, files, key, most)
            held = rows if most is None or split == "train" else rows.take(most)
            tables[split] = typed_table(f"{name} ({key})", held, digest=digest)
    train = tables.pop("train")
    kind = RowKind.of(task, train)
    columns = [column for column in train.columns if column in kind.columns]
    raw = streams[keys["train"]].select_columns(columns)
    features = raw.features or {}

    def read(row: Mapping[str, object]) -> dict[str, object]:
        values = {column: untyped(value, features.get(column)) for column, value in row.items()}
        return _row(kind, name, Record("a row", values))

    stream = TextStream(name=name, rows=raw.map(read, remove_columns=columns), kind=kind)
    return _corpus(stream, [train.digest, columns], tables, task, cache_dir=cache_dir)


def _corpus(
    stream: TextStream,
    digests: list[object],
    tables: dict[SplitName, Table],
    task: TaskConfig,
    *,
    cache_dir: Path,
) -> Corpus:
    name, kind, most = stream.name, stream.kind, task.max_eval_examples
    digests = [*digests, [(split, table.digest) for split, table in tables.items()]]
    if task.bad_rows == "drop":
        stream = replace(stream, bad=BadRows("drop"))
    held: dict[SplitName, Dataset] = {}
    for split, table in tables.items():
        of_split = RowKind.of(task, table, as_chat=kind.is_chat)
        held[split] = rows_of(table, of_split, task, cache_dir=cache_dir)
    if "validation" not in tables:
        if most is None:
            raise ConfigError(
                f"task.streaming: {name} has no validation split, and a stream has no end, so no "
                "share of it can be held out; add a validation split, or set "
                "task.max_eval_examples to hold out this many texts from its beginning"
            )
        first = [*islice(stream.read(), most)]
        digests.append(first)  # those of large files are of their beginnings and ends
        held["validation"] = rows = Dataset.from_list(first, features=kind.features)
        stream = replace(stream, held_out=frozenset(prompt_keys(rows).tolist()))
    if next(stream.read(), None) is None:  # raises for a first row that is bad
        raise DataError(
            f"{name} has no text to train on, beside {len(held['validation'])} held-out texts; "
            "add texts, or set a smaller task.max_eval_examples"
        )
    return Corpus(
        name=name,
        splits={"train": held["validation"].select([]), **held},
        classes=None,
        metrics=DEFAULT_METRICS[task.type],
        source_hash=key_of("stream", VERSION, digests),
        stream=stream,
    )


def _rows(paths: list[str], kind: RowKind) -> Iterator[dict[str, object]]:
    for path in paths:
        for record in records_of(Path(path)):
            yield _row(kind, path, record)


def _row(kind: RowKind, name: str, record: Record | DataError) -> dict[str, object]:
    try:
        if isinstance(record, DataError):
            raise record
        row = kind.row(name, record)
        return {column: row[column] for column in kind.features}
    except DataError as error:  # after an error of its own a generator cannot go on
        return {ERROR: str(error)}


class Place(NamedTuple):
    """The place of a rank in its share of a stream.

    epoch: how often the rank has read its share to the end.
    block: number of the block in the epoch.
    files: state of the share at the beginning of the block; None at the beginning of the share.
    taken: number of the block's rows that earlier steps have used.
    """

    epoch: int = 0
    block: int = 0
    files: Mapping[str, Any] | None = None
    taken: int = 0


@dataclass(frozen=True)
class StreamedBlocks:
    """The share of a rank, without end: encoded blocks, shuffled by (seed, epoch, block).

    characters: the least characters of a block; None: see `BLOCK_CHARACTERS`.
    """

    rows: StreamedRows
    shape: StepShape
    seed: int
    characters: int | None = None

    def read(self, place: Place) -> Generator[tuple[pa.Table, Place], None, None]:
        """Yield the rows of each block, with a column `epoch`, from the block of `place` on."""
        stream, tokenizer, task, packed = self.rows
        rank, world = self.shape.rank, self.shape.world
        least = max(BLOCK_CHARACTERS, CHARACTERS_PER_LENGTH * task.row_length)
        while True:
            # Its own files, if their number is a multiple of the ranks; else a row of each `world`.
            share = split_dataset_by_node(stream.rows, rank=rank, world_size=world)
            if place.files is not None:
                share.load_state_dict(dict(place.files))
            has_rows, unread = place.block > 0, stream.read(share)
            while texts := _block(unread, self.characters or least):
                rows = Dataset.from_list(texts)
                if is_chat(rows):
                    encoder = ChatEncoder(tokenizer, task, bad=stream.bad)
                    tables = tables_of_conversations(
                        rows, encoder, name=stream.name, counts={}, beside_training=True
                    )
                else:
                    tables = tables_of_texts(rows, tokenizer, task, packed=packed)
                if parts := [*tables]:
                    has_rows = True
                    table = cast("Any", pa).concat_tables(parts)  # pyarrow carries no types
                    order = np.random.default_rng([self.seed, place.epoch, place.block])
                    table = table.take(order.permutation(len(table)))
                    yield table.append_column(EPOCH, [[place.epoch] * len(table)]), place
                place = Place(place.epoch, place.block + 1, share.state_dict())
            if not has_rows:
                raise DataError(
                    f"{stream.name} has no text for rank {rank} of {world}: every rank needs at "
                    "least one text with tokens; use more texts or fewer ranks"
                )
            place = Place(place.epoch + 1)


def _block(unread: Iterator[dict[str, str]], least: int) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for row in unread:
        rows.append(row)
        least -= len(row.get(CONVERSATION, row["text"]))
        if least <= 0:
            break
    return rows


class StreamLoader(BatchSource):
    """The rows of a stream, grouped by optimizer step.

    Every step has `rows_per_step` rows, without dummy rows, and every rank has the same number of
    micro-batches. A rank that has read its share starts its share again. `masking` chooses new
    masks every time that a text is read, as a function of (seed, epoch, tokens of the row).
    """

    def __init__(
        self,
        blocks: StreamedBlocks,
        collate: Collator,
        *,
        steps_per_epoch: int,
        gather: Callable[[Any], list[Any]],
        masking: Masking | None = None,
    ) -> None:
        self._blocks, self._collate, self._masking = blocks, collate, masking
        self._gather, self.waited_s = gather, 0.0
        self.steps_per_epoch = steps_per_epoch
        """Steps that the log counts as one epoch, because the length of a stream is unknown."""
        self._step, self._place = 0, Place()

    def iterate(self, start: int, stop: int) -> Generator[list[Batch], None, None]:
        """Yield the steps from `start` up to, excluding, `stop`, prepared in a background thread.

        Earlier steps whose end is not the known place are read again.
        """
        if start < self._step:
            self._step, self._place = 0, Place()
        steps = self._steps(self._place)
        tasks = repeat(steps.__next__, stop - self._step)
        with closing(steps), closing(made_ahead(tasks)) as futures:
            for future in futures:
                batches, place = awaited(future, self)
                if self._blocks.shape.rank == 0 and place.epoch > self._place.epoch:
                    name = self._blocks.rows.texts.name
                    logger.info("%s: rank 0 has read its texts %d time(s)", name, place.epoch)
                # Of the step that is used, not of the steps that are prepared.
                self._step, self._place = self._step + 1, place
                if self._step > start:
                    yield batches

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and the place of every rank after it; a collective."""
        return {"step": self._step, "places": self._gather(self._place._asdict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._place = Place(**state["places"][self._blocks.shape.rank])

    def _steps(self, place: Place) -> Generator[tuple[list[Batch], Place], None, None]:
        shape, parts = self._blocks.shape, list[pa.Table]()
        missing = size = shape.per_device * shape.accumulation
        blocks = self._blocks.read(place)
        tasks = repeat(blocks.__next__)
        with closing(blocks), closing(made_ahead(tasks, 1, at_once=1)) as futures:
            for future in futures:
                rows, place = future.result()
                used = place.taken
                while used < len(rows):
                    parts.append(rows.slice(used, missing))
                    used, missing = used + len(parts[-1]), missing - len(parts[-1])
                    if missing == 0:
                        step = cast("Any", pa).concat_tables(parts)
                        if not self._blocks.rows.packed:  # micro-batches of like lengths
                            step = step.take(np.argsort(row_lengths(step), kind="stable"))
                        starts = range(0, size, shape.per_device)
                        batches = [self._batch(step.slice(n, shape.per_device)) for n in starts]
                        yield batches, place._replace(taken=used)
                        parts, missing = [], size

    def _batch(self, rows: Any) -> Batch:
        epochs, rows = rows.column(EPOCH).to_numpy(), rows.drop_columns(EPOCH)
        batch = self._collate(rows)
        if self._masking is None:
            return batch
        # The rows of a stream have no numbers: a number below 2^63 that depends on their tokens.
        tokens = (ids.values.to_numpy().tobytes() for ids in rows.column("input_ids"))
        digests = (hashlib.blake2b(row, digest_size=8).digest() for row in tokens)
        hashes = np.array([int.from_bytes(d, "little") >> 1 for d in digests], np.int64)
        return self._masking(batch, hashes, seed=self._blocks.seed, draw=epochs)
