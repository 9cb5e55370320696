"""The key of encoded rows: every text and every setting of the tokenizer that changes tokens."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from slow_tokenizer import SPECIAL, WORDS, Words
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megakd.config.task import TaskConfig
from megakd.data.encoding import encode_rows, tokenizer_content

TASK = TaskConfig(type="classification", dataset="none", max_length=2)


def fast(**keys: Any) -> PreTrainedTokenizerFast:
    numbers = {word: number for number, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(numbers, SPECIAL["unk_token"]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **SPECIAL, **keys)


def encoded(texts: list[str], tokenizer: Any, folder: Path) -> list[list[int]]:
    rows = Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
    made, _ = encode_rows({"test": rows}, tokenizer, TASK, content_hash="same", cache_dir=folder)
    return made["test"]["input_ids"][:]


def test_two_columns_of_one_file_that_differ_in_one_row_are_encoded_separately(tmp_path):
    """The file, and so the hash of its content, is the same for both choices of the column."""
    texts = ["a"] * 1000
    encoded(texts, fast(), tmp_path)

    for place in (1, 500, 998):
        clean = [*texts[:place], "b", *texts[place + 1 :]]
        assert encoded(clean, fast(), tmp_path)[place] == [3]


@pytest.mark.parametrize(
    ("text", "keys", "tokens"),
    [
        ("a a b", {"truncation_side": "left"}, [2, 3]),
        ("[PAD]", {"split_special_tokens": True}, [1]),
    ],
)
def test_a_setting_that_is_passed_at_every_call_changes_the_key(tmp_path, text, keys, tokens):
    encoded([text], fast(), tmp_path)

    assert encoded([text], fast(**keys), tmp_path) == [tokens]
    assert tokenizer_content(fast(**keys)) != tokenizer_content(fast())


def test_a_setting_of_a_tokenizer_without_a_backend_changes_the_key(tmp_path):
    assert encoded(["A"], Words(), tmp_path) == [[4]]
    assert encoded(["A"], Words(lower=True), tmp_path) == [[2]]


def test_the_key_of_a_tokenizer_without_a_backend_does_not_depend_on_its_folder(tmp_path):
    Words(lower=True).save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    keys = {tokenizer_content(Words.from_pretrained(tmp_path / name)) for name in ("one", "two")}

    assert len(keys) == 1
    assert tokenizer_content(Words.from_pretrained(tmp_path / "one")) in keys
