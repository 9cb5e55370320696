"""Folders of encoded data: shards of token numbers, the tokenizer, and a manifest.

`megakd encode` writes a folder shard by shard, and goes on after the last whole shard when it was
stopped. A run with `task.encoded` maps the shards into memory and reads no text. The rows are those
that a run encodes by itself, with the same key.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig, TokenizerConfig
from megakd.data.arrow import TEXTS_AT_ONCE, key_of, read_rows, write_tables
from megakd.data.chat.conversations import is_chat
from megakd.data.chat.counts import SETS, ChatCounts, CountsByName, say_chat
from megakd.data.chat.tokens import VERSION as CHAT_VERSION
from megakd.data.chat.tokens import rows_of_processes
from megakd.data.encoding import (
    VERSION,
    WORDS_VERSION,
    Encoded,
    encoded_key,
    no_tokens,
    save_tokenizer,
    tables_of,
    tokenizer_content,
)
from megakd.data.rows import VERSION as ROWS_VERSION
from megakd.data.splits import Splits
from megakd.data.tables import BadRows
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
from megakd.storage.fingerprint import Fingerprint, as_read_back, differences, flatten
from megakd.storage.folders import LOCK, damage_at_start

FORMAT = 1
MANIFEST, PROGRESS, TOKENIZER = "manifest.json", "progress.json", "tokenizer"
# Keys of `task` on which the rows do not depend, or which have facts of their own.
_FREE = ("encoded", "tokenizer", "mlm_probability", "streaming", "chat_template", "end_tokens")
# Fields of `Splits` that the manifest keeps.
_KEPT = ("label_names", "metrics", "content_hash", "sets_hash", "is_cut")
Record = Mapping[str, Any]
TEXTS_PER_SHARD = 100_000


def facts_of(task: TaskConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Fingerprint:
    """Return what the rows of a folder depend on, besides the texts.

    The seed is a fact only if it chooses labels to keep.
    """
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": {
            "tokens": VERSION,
            "rows": ROWS_VERSION,
            "chat": CHAT_VERSION,
            "words": WORDS_VERSION,
        },
        "task": {k: str(v) if k == "data_dir" else v for k, v in asdict(task).items()},
        "tokenizer": {"tokens": len(tokenizer), "content": tokenizer_content(tokenizer)[:16]},
    }
    if task.type == "causal_lm" and tokenizer.chat_template:
        facts["tokenizer"]["chat_template"] = key_of(tokenizer.chat_template)[:16]
    if task.mixture is not None:
        facts["sources"] = "encoded once"
    if isinstance(task.tokenizer, TokenizerConfig):
        facts["tokenizer"]["recipe"] = asdict(task.tokenizer)
    for key in (*_FREE, *(["bad_rows"] if task.bad_rows == "error" else ())):
        del facts["task"][key]
    if task.labelled_examples is not None:
        facts["seed"] = seed
    return as_read_back(flatten(facts))


def read_manifest(folder: Path, *, where: str = "task.encoded") -> Record:
    """Return the manifest of a finished folder."""
    if not folder.is_dir():
        raise DataError(
            f"{where}: {folder} does not exist on {socket.gethostname()}; write it with `megakd "
            "encode`, copy it to every node, or give a folder that all nodes share"
        )
    if not (folder / MANIFEST).is_file():
        unfinished = (folder / PROGRESS).is_file()
        state = "is not finished; start" if unfinished else "holds no encoded data; write it with"
        raise DataError(f"{where}: {folder} {state} `megakd encode`")
    try:
        manifest = read_signed(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {folder / MANIFEST} cannot be read ({error})") from error
    if manifest["facts"]["format"] != FORMAT:
        raise DataError(
            f"{where}: {folder} has format {manifest['facts']['format']}, and this version of "
            f"megakd reads format {FORMAT}; encode the data again"
        )
    return manifest


def open_splits(folder: Path) -> Splits:
    """Return the rows of a folder, memory-mapped: token numbers and labels, without texts."""
    manifest = read_manifest(folder)
    filled = {n: [s for s in shards if s["rows"]] for n, shards in manifest["shards"].items()}
    reason = damage_at_start(folder, {s["file"]: s for shards in filled.values() for s in shards})
    if reason is not None:
        raise DataError(
            f"task.encoded: {folder} is damaged: {reason}; copy the folder again, or remove it and "
            "encode the data again"
        )
    rows: dict[str, Dataset] = {}
    for name, shards in filled.items():
        files = [read_rows(folder / shard["file"]) for shard in shards]
        rows[name] = files[0] if len(files) == 1 else concatenate_datasets(files)
    sets = {n.removeprefix(f"{SETS}/"): r for n, r in rows.items() if n.startswith(f"{SETS}/")}
    return Splits(
        train=rows["train"],
        validation=rows["validation"],
        test=rows.get("test"),
        label_names=tuple(manifest["label_names"]),
        metrics=tuple(manifest["metrics"]),
        content_hash=manifest["content_hash"],
        evaluation_sets=sets,
        sets_hash=manifest["sets_hash"],
        is_cut=manifest["is_cut"],
    )


def as_encoded(
    folder: Path, splits: Splits, tokenizer: PreTrainedTokenizerBase, facts: Fingerprint
) -> Encoded:
    """Return the rows of `open_splits` as the encoded rows of a run, if they have its facts."""
    manifest = read_manifest(folder)
    differing = differences(manifest["facts"], facts)
    if differing:
        raise DataError(
            f"task.encoded: {folder} was encoded with other settings ({differing}); encode again "
            "with this config into another folder, or use the settings of the folder"
        )
    train = manifest["shards"]["train"]
    chat = _counts_of_shards([s for shards in manifest["shards"].values() for s in shards])
    if chat:
        say_chat({"train": splits.train}, chat, tokenizer)
    return Encoded(
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        content_hash=manifest["keys"]["key"],
        tokens_per_row=sum(s["tokens"] for s in train) / sum(s["rows"] for s in train),
        evaluation_sets=splits.evaluation_sets,
        chat=chat or None,
    )


def _counts_of_shards(shards: Iterable[Record]) -> CountsByName:
    counts: CountsByName = {}
    for shard in shards:
        for name, record in shard.get("chat", {}).items():
            counts.setdefault(name, ChatCounts()).add(ChatCounts.from_record(record))
    return counts


@dataclass
class _Writer:
    # By the name of the rows: the entries of the written shards in order, and the unfinished packed
    # row after the last shard (causal_lm), which is empty without one.

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    task: TaskConfig
    facts: Fingerprint
    keys: Mapping[str, Any]
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rests: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder / PROGRESS

    def resume(self) -> None:
        if not self.path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            strangers = sorted(
                f.name for f in self.folder.iterdir() if f.name != MANIFEST and LOCK not in f.name
            )
            if strangers:
                raise DataError(
                    f"{self.folder} holds other files ({strangers[0]}); give an empty folder"
                )
            self.save()
            return
        try:
            there = read_signed(self.path)
        except ValueError as error:
            raise DataError(f"{self.path} is damaged ({error}); remove {self.folder}") from error
        if not any(there["shards"].values()):  # nothing is lost
            self.save()
            return
        differing = _differing(there, self.facts, self.keys)
        if differing:
            raise DataError(
                f"{self.folder} holds unfinished data of other settings or texts ({differing}); "
                "remove the folder, or give another folder"
            )
        self.shards, self.rests = there["shards"], there["rests"]

    def save(self) -> None:
        state = {"shards": self.shards, "rests": self.rests}
        write_signed(self.path, {"facts": self.facts, "keys": self.keys, **state})

    def write(self, name: str, texts: Dataset) -> None:
        done = self.shards.setdefault(name, [])
        count = -(-len(texts) // TEXTS_PER_SHARD)
        first = min(len(done) * TEXTS_PER_SHARD, len(texts))
        with tqdm(total=len(texts), initial=first, desc=name, unit="texts") as bar:
            for number in range(len(done), count):
                start, stop = number * TEXTS_PER_SHARD, (number + 1) * TEXTS_PER_SHARD
                part = texts.select(range(start, min(stop, len(texts))))
                path = self.folder / f"{name.replace('/', '-')}-{number:05d}-of-{count:05d}.arrow"
                chat: CountsByName = {}
                if self.task.type == "causal_lm" and not is_chat(texts):  # packed over all texts
                    packed = self._packed(name, _parts(part, bar), is_last=number + 1 == count)
                    tables = tables_of_lists(packed, PackedRow._fields)
                else:
                    self.rests[name] = []
                    tables = self._tables(name, _parts(part, bar), chat)
                done.append(_write_shard(path, tables, chat))
                self.save()
        if not any(entry["rows"] for entry in done):
            raise no_tokens(texts, self.task, split=name, counts=_counts_of_shards(done))

    def _tables(
        self, name: str, parts: Iterator[Dataset], chat: CountsByName
    ) -> Iterator[pa.Table]:
        bad = BadRows(self.task.bad_rows)
        for part in parts:
            yield from tables_of(part, self.tokenizer, self.task, name=name, counts=chat, bad=bad)
        bad.finish()

    def _packed(self, name: str, parts: Iterator[Dataset], *, is_last: bool) -> Iterator[PackedRow]:
        columns = [np.asarray(column, dtype=np.int32) for column in self.rests.get(name, [])]
        packer = Packer(self.task.row_length, PackedRow(*columns) if columns else None)
        for part in parts:
            for document in documents_of(part, self.tokenizer):
                yield from packer.add(document)
        rest = packer.rest()
        self.rests[name] = [] if rest is None else [column.tolist() for column in rest]
        if rest is not None and is_last:
            yield rest


def _parts(texts: Dataset, bar: tqdm[Any]) -> Iterator[Dataset]:
    at_once = rows_of_processes(len(texts)) if is_chat(texts) else TEXTS_AT_ONCE
    for start in range(0, len(texts), at_once):
        part = range(start, min(start + at_once, len(texts)))
        yield texts.select(part)
        bar.update(len(part))


def _write_shard(path: Path, tables: Iterator[pa.Table], chat: CountsByName) -> dict[str, Any]:
    # `chat` is filled while the tables are read. A shard without rows has no file.
    counts = {"rows": 0, "tokens": 0}

    def counted() -> Iterator[pa.Table]:
        for table in tables:
            counts["rows"] += table.num_rows
            counts["tokens"] += len(table.column("input_ids").combine_chunks().flatten())
            yield table

    try:
        write_tables(path, counted())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    entry: dict[str, Any] = {"file": path.name, **counts}
    if chat:
        entry["chat"] = {name: asdict(tally) for name, tally in chat.items()}
    if counts["rows"]:
        return {**entry, **entry_of(path)}
    path.unlink()
    return {**entry, "size": 0, "sha256": ""}


def write_encoded(
    folder: Path,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    facts: Fingerprint,
) -> None:
    """Encode all rows of a run into a folder, or go on where an earlier call was stopped.

    The tokenizer is saved in the folder too.
    """
    rows = {"train": splits.train, "validation": splits.validation}
    rows |= {} if splits.test is None else {"test": splits.test}
    scored = dict(rows)
    rows |= {f"{SETS}/{name}": part for name, part in splits.evaluation_sets.items()}
    check_room_for_text(splits.train, tokenizer, task)
    key = encoded_key(scored, tokenizer, task, content_hash=splits.content_hash)
    keys = {"key": key, "sets": splits.sets_hash}
    if (folder / MANIFEST).is_file():
        _check_same(folder, facts, keys)
        return
    writer = _Writer(folder, tokenizer, task, facts, keys)
    try:
        writer.resume()
        for name, texts in rows.items():
            writer.write(name, texts)
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        save_tokenizer(tokenizer, folder / TOKENIZER)
        sync_tree(folder)
        write_signed(
            folder / MANIFEST,
            {
                "facts": facts,
                "keys": keys,
                "shards": writer.shards,
                **{name: getattr(splits, name) for name in _KEPT},
            },
        )
        writer.path.unlink()
    except OSError as error:
        raise DataError(
            f"{folder}: the encoded data cannot be written: {full_disk_reason(error) or error}; "
            "the whole shards are kept, start the same command again to go on"
        ) from error


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
    return differences({**there["facts"], **there["keys"]}, {**facts, **keys})
