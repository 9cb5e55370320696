"""Folders of encoded data: shards of token numbers, the tokenizer, and a manifest.

`megakd encode` writes a folder shard by shard, and goes on after the last whole shard when it was
stopped. A run with `task.encoded` maps the shards into memory and reads no text. The rows are those
that a run encodes by itself, with the same key.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import concatenate_datasets

from megakd.config.task import TokenizerConfig
from megakd.data.cache import key_of, read_rows
from megakd.data.chat.counts import SETS, ChatCounts, say_chat
from megakd.data.chat.tokens import VERSION as CHAT_VERSION
from megakd.data.encoding import VERSION, Encoded, tokenizer_content
from megakd.data.splits import Splits
from megakd.errors import DataError
from megakd.storage.checksums import read_signed
from megakd.storage.fingerprint import Fingerprint, as_read_back, differences, flatten
from megakd.storage.folders import damage_at_start

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from megakd.config.task import TaskConfig
    from megakd.data.chat.counts import CountsByName

FORMAT = 1
MANIFEST, PROGRESS, TOKENIZER = "manifest.json", "progress.json", "tokenizer"
# Keys of `task` on which the rows do not depend, or which have facts of their own.
_FREE = (
    "encoded",
    "tokenizer",
    "mlm_probability",
    "streaming",
    "chat_template",
    "end_tokens",
)
Record = Mapping[str, Any]


def facts_of(task: TaskConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Fingerprint:
    """Return what the rows of a folder depend on, besides the texts.

    Args:
        task: the task; the keys that choose and shape the rows are facts.
        tokenizer: the tokenizer of the data.
        seed: seed of the run; a fact only if it chooses labels to keep or rows of a mixture.
    """
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "task": {k: str(v) if k == "data_dir" else v for k, v in asdict(task).items()},
        "tokenizer": {"tokens": len(tokenizer), "content": tokenizer_content(tokenizer)[:16]},
    }
    if task.type == "causal_lm" and tokenizer.chat_template:
        facts["tokenizer"]["chat_template"] = key_of(tokenizer.chat_template)[:16]
    if task.mixture is not None:
        facts["chat_version"] = CHAT_VERSION
    if isinstance(task.tokenizer, TokenizerConfig):
        facts["tokenizer"]["recipe"] = asdict(task.tokenizer)
    for key in (*_FREE, *(["bad_rows"] if task.bad_rows == "error" else ())):
        del facts["task"][key]
    if task.labelled_examples is not None or task.mixture is not None:
        facts["seed"] = seed
    return as_read_back(flatten(facts))


def read_manifest(folder: Path, *, where: str = "task.encoded") -> Record:
    """Return the manifest of a finished folder.

    Raises:
        DataError: the folder does not exist here, is not finished, or is damaged.
    """
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
    """Return the rows of a folder, memory-mapped: token numbers and labels, without texts.

    Raises:
        DataError: the folder does not exist here, is not finished, or is damaged.
    """
    manifest = read_manifest(folder)
    _check_files(folder, manifest)
    rows = {name: _mapped(folder, shards) for name, shards in manifest["shards"].items()}
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
    """Return the rows of `open_splits` as the encoded rows of a run.

    Args:
        folder: the folder.
        splits: the rows of the folder.
        tokenizer: the tokenizer of the run.
        facts: see `facts_of`.

    Raises:
        DataError: the rows were encoded with another tokenizer or with other settings.
    """
    manifest = read_manifest(folder)
    differing = differences(manifest["facts"], facts)
    if differing:
        raise DataError(
            f"task.encoded: {folder} was encoded with other settings ({differing}); encode again "
            "with this config into another folder, or use the settings of the folder"
        )
    train = manifest["shards"]["train"]
    chat = counts_of_shards([s for shards in manifest["shards"].values() for s in shards])
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


def counts_of_shards(shards: Iterable[Record]) -> CountsByName:
    """Return the numbers of the conversations in shards; empty for other rows."""
    counts: CountsByName = {}
    for shard in shards:
        for name, record in shard.get("chat", {}).items():
            counts.setdefault(name, ChatCounts()).add(ChatCounts.from_record(record))
    return counts


def _check_files(folder: Path, manifest: Record) -> None:
    entries = {s["file"]: s for shards in manifest["shards"].values() for s in shards if s["rows"]}
    found = damage_at_start(folder, entries)
    if found is not None:
        raise DataError(
            f"task.encoded: {folder} is damaged: {found}; copy the folder again, or remove it and "
            "encode the data again"
        )


def _mapped(folder: Path, shards: list[Record]) -> Dataset:
    files = [read_rows(folder / shard["file"]) for shard in shards if shard["rows"]]
    return files[0] if len(files) == 1 else concatenate_datasets(files)
