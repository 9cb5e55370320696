"""Training texts that are read, encoded and shuffled while a run learns them: `task.streaming`.

`datasets` reads the share of each rank and says where a rank is. A batched map encodes and shuffles
a block of the share, so that a resumed run encodes only this block again. The buffer of a shuffled
`IterableDataset` is not in its state, so it is not used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from megakd.config.task import TaskConfig
from megakd.data.arrow import key_of
from megakd.data.batch import Batch, BatchSource
from megakd.data.chat_tokens import ChatEncoder, tables_of_conversations
from megakd.data.collation import Collator, Masking
from megakd.data.conversations import CONVERSATION
from megakd.data.files import local_tables, split_files
from megakd.data.hub import hub_errors, hub_source, splits_of
from megakd.data.loader import StepShape, awaited, made_ahead
from megakd.data.readers import records_of, typed_table, untyped
from megakd.data.records import BadRows, Record, Table
from megakd.data.rows import (
    ERROR,
    VERSION,
    Corpus,
    RowKind,
    StreamedRows,
    TextStream,
    prompt_keys,
    rows_of,
)
from megakd.data.token_tables import tables_of_texts
from megakd.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
BLOCK_CHARACTERS, CHARACTERS_PER_LENGTH = 1_000_000, 128
"""About the characters of a block, and per token of `max_length`: about 32 packed rows, of which
the last is shorter than the others."""
Place = tuple[int, "Mapping[str, Any] | None"]
"""How often a rank has read its share to the end, and the state of `datasets` in the middle."""
AHEAD = 64
"""Steps that are prepared, so that the next block is encoded meanwhile."""


def streamed_files(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return a stream of local files, in their order, and the rows of the held-out files."""
    tables = local_tables(task)
    paths, _ = split_files(task)
    kind = RowKind.from_task(task, tables["train"])
    # `datasets` gives each rank a part of what is in a list, so that a list holds only the files.
    rows = IterableDataset.from_generator(
        _rows, gen_kwargs={"paths": [*map(str, paths["train"])], "kind": kind}
    )
    return _corpus(rows, kind, tables, task, cache_dir=cache_dir)


def streamed_hub_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return a stream of the Hub data set `task.dataset`, and the rows of its held-out splits.

    These are the first `task.max_eval_examples` rows of a split.
    """
    (name, options), most = hub_source(task), task.max_eval_examples
    with hub_errors(name, task.dataset_config) as label:
        builder = datasets.load_dataset_builder(name, task.dataset_config, **options)
        streams = cast("Mapping[str, IterableDataset]", builder.as_streaming_dataset())
        keys = task.splits or splits_of([*streams], label)
        for split, key in keys.items():
            if key not in streams:
                raise DataError(
                    f"task.splits.{split}: the data set {label} has no split {key!r}, and a "
                    f"stream reads no part of one; its splits are {', '.join(streams)}"
                )
        files = str(builder.config.data_files and dict(builder.config.data_files))
        tables: dict[str, Table] = {}
        for split, key in keys.items():
            digest = key_of(name, task.dataset_config, builder.hash, files, key, most)
            held = streams[key] if most is None or split == "train" else streams[key].take(most)
            tables[split] = typed_table(f"{name} ({key})", held, digest=digest)
    kind = RowKind.from_task(task, tables["train"])
    columns = [column for column in tables["train"].columns if column in kind.columns]
    raw = streams[keys["train"]].select_columns(columns)
    features = raw.features or {}

    def read(row: Mapping[str, object]) -> dict[str, object]:
        values = {column: untyped(value, features.get(column)) for column, value in row.items()}
        return _row(kind, name, Record("a row", values))

    return _corpus(raw.map(read, remove_columns=columns), kind, tables, task, cache_dir=cache_dir)


def _corpus(
    rows: IterableDataset,
    kind: RowKind,
    tables: Mapping[str, Table],
    task: TaskConfig,
    *,
    cache_dir: Path,
) -> Corpus:
    name, most = task.data_name, task.max_eval_examples
    digests: list[object] = [kind.columns, [(split, t.digest) for split, t in tables.items()]]
    bad = BadRows("drop") if task.bad_rows == "drop" else BadRows(named=1)
    stream = TextStream(name=name, rows=rows, kind=kind, bad=bad)
    held: dict[str, Dataset] = {}
    for split, table in tables.items():
        if split != "train":
            of_split = RowKind.from_task(task, table, as_chat=kind.is_chat)
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
        held["validation"] = first_rows = Dataset.from_list(first, features=kind.features)
        stream = replace(stream, held_out=frozenset(prompt_keys(first_rows).tolist()))
    if next(stream.read(), None) is None:  # raises for a first row that is bad
        raise DataError(
            f"{name} has no text to train on, beside {len(held['validation'])} held-out texts; "
            "add texts, or set a smaller task.max_eval_examples"
        )
    return Corpus(
        splits={"train": held["validation"].select([]), **held},
        classes=None,
        kind=kind,
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


@dataclass(frozen=True)
class StreamedShare:
    """The share of a rank, encoded in blocks of `size` texts; None: see `BLOCK_CHARACTERS`."""

    rows: StreamedRows
    shape: StepShape
    seed: int
    size: int | None = None

    def read(self, epoch: int) -> IterableDataset:
        """Return the encoded rows of an epoch, shuffled in each block by (seed, epoch, block)."""
        texts, size = self.rows.texts, self.size or _block_size(self.rows)
        # Its own files, if their number is a multiple of the ranks; else a row of each `world`.
        share = split_dataset_by_node(texts.rows, self.shape.rank, self.shape.world)

        def encode(columns: dict[str, list[str]], numbers: list[int]) -> dict[str, list[object]]:
            listed = (zip(columns, row, strict=True) for row in zip(*columns.values(), strict=True))
            present = ({name: text for name, text in row if text is not None} for row in listed)
            tables = [*_encoded([*texts.read(present)], self.rows)]
            if not tables:
                return {"input_ids": []}
            table = cast("Any", pa).concat_tables(tables)  # pyarrow carries no types
            order = np.random.default_rng([self.seed, epoch, numbers[0] // size])
            return table.take(order.permutation(len(table))).to_pydict()

        gone = [*texts.kind.features, ERROR]
        return share.map(
            encode, with_indices=True, batched=True, batch_size=size, remove_columns=gone
        )


def _block_size(rows: StreamedRows) -> int:
    head = islice(rows.texts.read(), 100)
    lengths = [len(row.get(CONVERSATION, row["text"])) for row in head]
    characters = max(BLOCK_CHARACTERS, CHARACTERS_PER_LENGTH * rows.task.row_length)
    return max(1, characters * len(lengths) // sum(lengths))


def _encoded(texts: list[dict[str, object]], how: StreamedRows) -> Iterable[pa.Table]:
    if not texts:
        return []
    rows = Dataset.from_list(texts)
    if not how.texts.kind.is_chat:
        return tables_of_texts(rows, how.tokenizer, how.task, packed=how.packed)
    encoder = ChatEncoder(how.tokenizer, how.task, bad=how.texts.bad)
    return tables_of_conversations(rows, encoder, counts={}, beside_training=True)


class StreamLoader(BatchSource):
    """The rows of a stream, grouped by optimizer step.

    Every step has `rows_per_step` rows, without dummy rows, and every rank has the same number of
    micro-batches. A rank that has read its share starts its share again. `masking` chooses new
    masks every time that a text is read, as a function of (seed, epoch, tokens of the row).
    """

    def __init__(
        self,
        share: StreamedShare,
        collate: Collator,
        *,
        steps_per_epoch: int,
        gather: Callable[[Any], list[Any]],
        masking: Masking | None = None,
    ) -> None:
        self._share, self._collate, self._masking = share, collate, masking
        self._gather, self.waited_s = gather, 0.0
        self.steps_per_epoch = steps_per_epoch
        """Steps that the log counts as one epoch, because the length of a stream is unknown."""
        self._place: Place = (0, None)

    def iterate(self, start: int, stop: int) -> Generator[list[Batch], None, None]:
        """Yield the steps from `start`, the step of the state, up to, excluding, `stop`."""
        steps = self._steps(*self._place)
        with (
            closing(steps),
            closing(made_ahead(repeat(steps.__next__, stop - start), AHEAD)) as futures,
        ):
            for future in futures:
                batches, place = awaited(future, self)
                if self._share.shape.rank == 0 and place[0] > self._place[0]:
                    name = self._share.rows.texts.name
                    logger.info("%s: rank 0 has read its texts %d time(s)", name, place[0])
                self._place = place  # of the step that is used, not of those that are prepared
                yield batches

    def state_dict(self) -> dict[str, Any]:
        """Return the place of every rank; a collective."""
        return {"places": self._gather(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        epoch, rows = state["places"][self._share.shape.rank]
        self._place = epoch, rows

    def _steps(
        self, epoch: int, state: Mapping[str, Any] | None
    ) -> Generator[tuple[list[Batch], Place], None, None]:
        shape, rows = self._share.shape, list[tuple[int, dict[str, Any]]]()
        while True:
            share = self._share.read(epoch)
            if state is not None:
                share.load_state_dict(dict(state))
            is_empty = state is None
            for row in share:
                is_empty = False
                rows.append((epoch, row))
                if len(rows) == shape.per_device * shape.accumulation:
                    if not self._share.rows.packed:  # micro-batches of like lengths
                        rows.sort(key=lambda pair: len(pair[1]["input_ids"]))
                    starts = range(0, len(rows), shape.per_device)
                    batches = [self._batch(rows[n : n + shape.per_device]) for n in starts]
                    yield batches, (epoch, share.state_dict())
                    rows = []
            if is_empty:
                raise DataError(
                    f"{self._share.rows.texts.name} has no text for rank {shape.rank} of "
                    f"{shape.world}: every rank needs at least one text with tokens; use more "
                    "texts or fewer ranks"
                )
            epoch, state = epoch + 1, None

    def _batch(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> Batch:
        batch = self._collate([row for _, row in rows])
        if self._masking is None:
            return batch
        # The rows of a stream have no numbers: a number below 2^63 that depends on their tokens.
        tokens = (np.asarray(row["input_ids"], np.int32).tobytes() for _, row in rows)
        digests = (hashlib.blake2b(row, digest_size=8).digest() for row in tokens)
        hashes = np.array([int.from_bytes(d, "little") >> 1 for d in digests], np.int64)
        epochs = np.array([epoch for epoch, _ in rows])
        return self._masking(batch, hashes, seed=self._share.seed, draw=epochs)
