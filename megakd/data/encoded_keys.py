"""Keys of encoded rows: hashes of everything that the rows depend on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.data.cache import key_of
from megakd.data.chat_encoding import chat_key
from megakd.data.chat_rows import is_chat
from megakd.data.rows import rows_key
from megakd.storage.atomic import sha256_of
from megakd.storage.checksums import files_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from megakd.config.task import TaskConfig

# Part of every key: increase this number when the encoded rows would differ.
VERSION = 1
# Part of the keys of rows with words, likewise.
WORDS_VERSION = 2


def encoded_key(
    rows: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskConfig,
    *,
    content_hash: str,
) -> str:
    """Return a hash of everything that the encoded rows depend on; see `encode_rows`."""
    parts = {
        "version": VERSION,
        "content": content_hash,
        "rows": {name: rows_key(split) for name, split in rows.items()},
        "tokenizer": tokenizer_content(tokenizer),
        "max_length": task.row_length,
        "type": task.type,
    }
    if task.whole_word_masking:
        parts["words"] = WORDS_VERSION
    if any(map(is_chat, rows.values())):
        parts["chat"] = chat_key(tokenizer, task)
    return key_of(parts)


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 of everything that determines the tokens of a text.

    The hash is the same in every process.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = _saved_files(tokenizer)
    else:
        content = json.loads(backend.to_str())
        # The settings of the last call, which are not properties of the tokenizer.
        content.update(truncation=None, padding=None)
    return key_of(
        {
            "class": type(tokenizer).__name__,
            "content": content,
            "inputs": list(tokenizer.model_input_names),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            # Settings that every call passes to the backend, which does not store them.
            "truncation_side": tokenizer.truncation_side,
            "split_special_tokens": tokenizer.split_special_tokens,
        }
    )


def _saved_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the sha256 of every file that a tokenizer without a backend is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {name: sha256_of(Path(folder, name)) for name in files_of(Path(folder))}
