"""Lengths of rows in tokens before they are cut, measured on a sample of the rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megakd.config.task import MOST_TOKENS
from megakd.data.bad_rows import BadRows
from megakd.data.chat_rows import CONVERSATION, Conversation, is_chat
from megakd.data.chat_tokens import ChatEncoder
from megakd.data.encoded_keys import encoded_key
from megakd.data.rows import PLACE, Histogram
from megakd.data.token_tables import documents_of
from megakd.storage.atomic import write_json
from megakd.storage.built_once import whole_folder

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from megakd.config.task import TaskConfig

MOST_ROWS, MOST_MEASURED = 10_000, 5_000_000
"""Rows and tokens that are measured at most, so that the cost does not grow with the data."""
ROWS_AT_ONCE = 100
FILE = "lengths.json"


class Lengths(NamedTuple):
    """Lengths of whole rows, and of the prompts in them (0 without a prompt)."""

    tokens: Histogram
    prompts: Histogram


def measured_lengths(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, *, cache_dir: Path
) -> Lengths:
    """Return the lengths of a sample of rows, or the result of an earlier call.

    The sample depends only on the number of rows. Rows that cannot be encoded are left out.

    Args:
        rows: rows of text.
        tokenizer: the tokenizer; the key contains its content, not its name.
        task: the task; the result does not depend on `max_length`.
        cache_dir: folder that contains the folder of the result.
    """
    sample = rows.select(np.random.default_rng(0).permutation(len(rows))[:MOST_ROWS])
    whole = replace(task, max_length=MOST_TOKENS, truncation="keep_start", bad_rows="drop")

    def build(folder: Path) -> None:
        made = Lengths(Counter(), Counter())
        for start in range(0, len(sample), ROWS_AT_ONCE):
            part = sample.select(range(start, min(start + ROWS_AT_ONCE, len(sample))))
            for tokens, prompt in _measured(part, tokenizer, whole):
                made.tokens[tokens] += 1
                made.prompts[prompt] += 1
            if sum(n * count for n, count in made.tokens.items()) > MOST_MEASURED:
                break
        write_json(folder / FILE, made)

    key = encoded_key({"rows": sample}, tokenizer, whole, content_hash="")
    folder = whole_folder(cache_dir / "lengths" / key, build)
    read = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return Lengths(*({int(n): count for n, count in counts.items()} for counts in read))


def _measured(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> Iterator[tuple[int, int]]:
    """Yield the number of tokens of each row, and of the prompt in it."""
    if is_chat(rows):
        encoder = ChatEncoder(tokenizer, task, bad=BadRows("drop", named=0))
        conversations = list(map(Conversation.from_json, rows[CONVERSATION]))
        for made, counts in encoder(conversations, rows[PLACE]):
            yield from ((n, row.prompt_length) for n in counts.lengths for row in made)
    elif task.type == "causal_lm":
        yield from ((len(document), 0) for document in documents_of(rows, tokenizer))
    else:
        texts = [rows[name] for name in ("text", "text_pair") if name in rows.column_names]
        encoded = tokenizer(*map(list, texts), truncation=False, verbose=False)
        yield from ((len(ids), 0) for ids in encoded["input_ids"])
