"""Writer of the folders of `encoded_folder`: shard by shard, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from megakd.data.bad_rows import BadRows
from megakd.data.cache import TEXTS_AT_ONCE, write_tables
from megakd.data.chat.counts import SETS
from megakd.data.chat.rows import is_chat
from megakd.data.encoded_folder import (
    MANIFEST,
    PROGRESS,
    TOKENIZER,
    counts_of_shards,
    open_splits,
    read_manifest,
)
from megakd.data.encoding import encoded_key, no_tokens, tables_of
from megakd.data.token_tables import (
    PackedRow,
    Packer,
    check_room_for_text,
    documents_of,
    tables_of_lists,
)
from megakd.errors import DataError
from megakd.storage.atomic import full_disk_reason, sync_tree
from megakd.storage.checksums import entry_of, read_signed, write_signed
from megakd.storage.fingerprint import Fingerprint, differences

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from megakd.config.task import TaskConfig
    from megakd.data.chat.counts import CountsByName
    from megakd.data.splits import Splits

TEXTS_PER_SHARD = 100_000


@dataclass
class _Progress:
    """The shards that are written, kept in the folder after every shard.

    shards: by the name of the rows, the entries of the shards in order.
    rests: by the name of the rows, the unfinished packed row after the last shard (causal_lm).
    """

    folder: Path
    facts: Fingerprint
    keys: Mapping[str, Any]
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rests: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / PROGRESS

    def resume(self) -> None:
        """Read the shards of a stopped call.

        Raises:
            DataError: the folder holds shards of other texts or settings, or other files.
        """
        if not self.path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            strangers = sorted(f.name for f in self.folder.iterdir() if f.name != MANIFEST)
            if strangers:
                raise DataError(
                    f"{self.folder} holds other files ({strangers[0]}); give an empty folder"
                )
            return
        there = read_signed(self.path)
        differing = _differing(there, self.facts, self.keys)
        if differing:
            raise DataError(
                f"{self.folder} holds unfinished data of other settings or texts ({differing}); "
                "remove the folder, or give another folder"
            )
        self.shards, self.rests = there["shards"], there["rests"]

    def save(self) -> None:
        """Record the shards; the file is replaced whole."""
        state = {"shards": self.shards, "rests": self.rests}
        write_signed(self.path, {"facts": self.facts, "keys": self.keys, **state})


def write_encoded(
    folder: Path,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    facts: Fingerprint,
) -> None:
    """Encode all rows of a run into a folder, or go on where an earlier call was stopped.

    Args:
        folder: a folder that does not exist, is empty, or was begun by an earlier call.
        splits: the texts and labels.
        tokenizer: the tokenizer, which is saved in the folder.
        task: the task; `type`, `max_length` and `whole_word_masking` shape the rows.
        facts: see `encoded_folder.facts_of`.

    Raises:
        DataError: the folder holds data of other settings or texts, cannot be written, or the
            texts have no tokens.
    """
    rows = _rows_of(splits)
    check_room_for_text(splits.train, tokenizer, task)
    scored = {name: split for name, split in rows.items() if not name.startswith(SETS)}
    key = encoded_key(scored, tokenizer, task, content_hash=splits.content_hash)
    keys = {"key": key, "sets": splits.sets_hash}
    if (folder / MANIFEST).is_file():
        _check_same(folder, facts, keys)
        return
    progress = _Progress(folder, facts, keys)
    try:
        progress.resume()
        for name, texts in rows.items():
            _write_shards(progress, name, texts, tokenizer, task)
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        tokenizer.save_pretrained(folder / TOKENIZER)
        sync_tree(folder)
        write_signed(folder / MANIFEST, _manifest(progress, splits))
        progress.path.unlink()
    except OSError as error:
        raise DataError(
            f"{folder}: the encoded data cannot be written: {full_disk_reason(error) or error}; "
            "the whole shards are kept, start the same command again to go on"
        ) from error


def _rows_of(splits: Splits) -> dict[str, Dataset]:
    held = {"validation": splits.validation, "test": splits.test}
    sets = {f"{SETS}/{name}": rows for name, rows in splits.evaluation_sets.items()}
    return {"train": splits.train, **{n: r for n, r in held.items() if r is not None}, **sets}


def _check_same(folder: Path, facts: Fingerprint, keys: Mapping[str, Any]) -> None:
    there = read_manifest(folder, where="--to")
    differing = _differing(there, facts, keys)
    if differing:
        raise DataError(
            f"{folder} holds data of other settings or texts ({differing}); give another folder, "
            "or remove this folder"
        )
    open_splits(folder)


def _differing(there: Mapping[str, Any], facts: Fingerprint, keys: Mapping[str, Any]) -> str:
    """Return the facts and keys of a folder that differ from these, with both values."""
    return differences({**there["facts"], **there["keys"]}, {**facts, **keys})


def _manifest(progress: _Progress, splits: Splits) -> dict[str, Any]:
    return {
        "facts": progress.facts,
        "keys": progress.keys,
        "shards": progress.shards,
        "label_names": splits.label_names,
        "metrics": splits.metrics,
        "content_hash": splits.content_hash,
        "sets_hash": splits.sets_hash,
        "is_cut": splits.is_cut,
    }


def _write_shards(
    progress: _Progress,
    name: str,
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
) -> None:
    done = progress.shards.setdefault(name, [])
    count = -(-len(texts) // TEXTS_PER_SHARD)
    first = min(len(done) * TEXTS_PER_SHARD, len(texts))
    with tqdm(total=len(texts), initial=first, desc=name, unit="texts") as bar:
        for number in range(len(done), count):
            own = range(number * TEXTS_PER_SHARD, min((number + 1) * TEXTS_PER_SHARD, len(texts)))
            shard = _Shard(name, texts, own, tokenizer, task, progress.rests.get(name))
            file = f"{name.replace('/', '-')}-{number:05d}-of-{count:05d}.arrow"
            done.append(shard.write(progress.folder / file, bar))
            progress.rests[name] = shard.rest
            progress.save()
    if not any(entry["rows"] for entry in done):
        counts = counts_of_shards(done)
        raise no_tokens(texts, task, split=name, counts=counts)


class _Shard:
    """The rows of a range of texts.

    rest: the unfinished packed row before and, after `write`, behind the texts; [] without one.
    """

    def __init__(
        self,
        name: str,
        texts: Dataset,
        own: range,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskConfig,
        rest: list[list[int]] | None,
    ) -> None:
        self.name, self.texts, self.own = name, texts, own
        self.tokenizer, self.task = tokenizer, task
        self.rest = rest or []

    def write(self, path: Path, bar: tqdm[Any]) -> dict[str, Any]:
        """Write the file of the shard, and return its entry; a shard without rows has no file."""
        counts = {"rows": 0, "tokens": 0}
        chat: CountsByName = {}

        def counted() -> Iterator[pa.Table]:
            for table in self._tables(bar, chat):
                counts["rows"] += table.num_rows
                counts["tokens"] += len(table.column("input_ids").combine_chunks().flatten())
                yield table

        write_tables(path, counted())
        entry: dict[str, Any] = {"file": path.name, **counts}
        if chat:
            entry["chat"] = {name: own.to_record() for name, own in chat.items()}
        if counts["rows"]:
            return {**entry, **entry_of(path)}
        path.unlink()
        return {**entry, "size": 0, "sha256": ""}

    def _tables(self, bar: tqdm[Any], chat: CountsByName) -> Iterator[pa.Table]:
        if self.task.type == "causal_lm" and not is_chat(self.texts):  # packed over all texts
            yield from tables_of_lists(self._packed(bar), PackedRow._fields)
            return
        bad = BadRows(self.task.bad_rows)
        for part in self._parts(bar):
            yield from tables_of(
                part, self.tokenizer, self.task, name=self.name, counts=chat, bad=bad
            )

    def _packed(self, bar: tqdm[Any]) -> Iterator[PackedRow]:
        columns = [np.asarray(column, dtype=np.int32) for column in self.rest]
        packer = Packer(self.task.row_length, PackedRow(*columns) if columns else None)
        for part in self._parts(bar):
            for document in documents_of(part, self.tokenizer):
                yield from packer.add(document)
        rest = packer.rest()
        self.rest = [] if rest is None else [column.tolist() for column in rest]
        if rest is not None and self.own.stop == len(self.texts):
            yield rest

    def _parts(self, bar: tqdm[Any]) -> Iterator[Dataset]:
        """Yield the texts, a few at a time, and move the bar after each part."""
        for start in range(self.own.start, self.own.stop, TEXTS_AT_ONCE):
            part = range(start, min(start + TEXTS_AT_ONCE, self.own.stop))
            yield self.texts.select(part)
            bar.update(len(part))
