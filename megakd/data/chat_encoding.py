"""Encoded conversations on disk, with their numbers beside them, and what a run logs of them."""

from __future__ import annotations

import json
import logging
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megakd.contract.batch import IGNORE
from megakd.data.cache import key_of, read_rows, write_tables
from megakd.data.chat.counts import ChatCounts, CountsByName, say_counts
from megakd.data.chat.tokens import VERSION, chat_tables
from megakd.storage.atomic import write_json
from megakd.storage.folders import whole_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from megakd.config.task import TaskConfig

logger = logging.getLogger(__name__)
COUNTS = "counts.json"
MOST_SHOWN = 400
"""Characters at each end of a long part of the first row that the log shows."""


def chat_key(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> str:
    """Return a hash of what encoded conversations depend on, besides rows, tokens and length."""
    return key_of(
        {
            "version": VERSION,
            "template": tokenizer.chat_template,
            "options": task.chat_template_kwargs,
            "reasoning": task.reasoning,
            "train_on": task.train_on,
            "truncation": task.truncation,
            "bad_rows": task.bad_rows,
        }
    )


def encode_chat(
    rows: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    key: str,
    cache_dir: Path,
) -> dict[str, Dataset]:
    """Encode conversations, or reuse the result of an earlier call, and log their numbers.

    Args:
        rows: conversations by name, see `chat.rows`.
        tokenizer: the tokenizer.
        task: the task.
        key: hash of everything that the encoded rows depend on.
        cache_dir: folder that contains the folder named by the key.

    Returns:
        The encoded rows by name, memory-mapped; see `counts_of` for their numbers.

    Raises:
        DataError: a row cannot be encoded, no row of a split is left, or the cache cannot be
            written.
    """

    def build(folder: Path) -> None:
        logger.info("encoding the conversations of %s", ", ".join(rows))
        counts: CountsByName = {}
        for name, split in rows.items():
            own: CountsByName = {}
            made = chat_tables(split, tokenizer, task, name=name, counts=own)
            write_tables(folder / f"{name}.arrow", made)
            counts |= own
        write_json(folder / COUNTS, {name: own.to_record() for name, own in counts.items()})

    folder = whole_folder(cache_dir / "encoded" / key, build)
    made = {name: read_rows(folder / f"{name}.arrow") for name in rows}
    say_chat(made, counts_of(cache_dir, key), tokenizer)
    return made


def counts_of(cache_dir: Path, key: str) -> CountsByName:
    """Return the numbers of the conversations that `encode_chat` has encoded."""
    text = (cache_dir / "encoded" / key / COUNTS).read_text(encoding="utf-8")
    return {name: ChatCounts.from_record(own) for name, own in json.loads(text).items()}


def say_chat(
    rows: Mapping[str, Dataset], counts: CountsByName, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Log the table of encoded conversations and the first row with its counted parts marked."""
    say_counts(counts)
    name = next(iter(rows))
    logger.info("first row of %s, [[what counts]]: %s", name, shown_row(rows[name][0], tokenizer))


def shown_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of an encoded row with [[ and ]] around the tokens that count."""
    ids, labels = row["input_ids"], row["labels"]
    counts = [False, *(label != IGNORE for label in labels[:-1])]
    parts: list[str] = []
    for does_count, group in groupby(zip(counts, ids, strict=True), key=lambda pair: pair[0]):
        text = cast("str", tokenizer.decode([token for _, token in group]))
        if len(text) > 2 * MOST_SHOWN:
            text = f"{text[:MOST_SHOWN]} … {text[-MOST_SHOWN:]}"
        parts.append(f"[[{text}]]" if does_count else text)
    return "".join(parts)
