"""Texts as windows: nothing lost, framed as the tokenizer does it, padded, not labelled yet."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megakd.config.task import TaskConfig
from megakd.data.collation import Collator
from megakd.data.encoding import Encoded, encode_splits
from megakd.data.token_tables import windows
from megakd.errors import DataError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
TEXTS = ["a b c", "d", "e f g h i j k l m n", "", "o p"]


class _Splits(NamedTuple):
    train: Any
    validation: Any
    test: Any = None
    content_hash: str = "content"
    evaluation_sets: Any = MappingProxyType({})
    stream: Any = None


def _tokenizer(**roles: str) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=SPECIAL[1]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad_token": SPECIAL[0], **roles}
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def _task(max_length: int = 8) -> TaskConfig:
    return TaskConfig(type="mlm", dataset="none", max_length=max_length)


def _encoded(tmp_path, tokenizer=None, **keys) -> Encoded:
    rows = Dataset.from_dict({"text": TEXTS})
    splits: Any = _Splits(rows, rows)
    return encode_splits(splits, tokenizer or _tokenizer(), _task(**keys), cache_dir=tmp_path)


@given(st.lists(st.integers(), max_size=200), st.integers(1, 50))
def test_windows_lose_nothing_and_are_few_full_and_alike(ids, room):
    cut = [*windows(ids, room)]

    assert [token for window in cut for token in window] == ids
    assert len(cut) == -(-len(ids) // room)
    lengths = {len(window) for window in cut}
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert all(1 <= length <= room for length in lengths)


def test_a_window_without_room_is_an_error():
    with pytest.raises(ValueError, match="at least 1 token, got room 0"):
        list(windows([1], 0))


def test_a_text_for_mlm_is_cut_into_framed_windows_of_its_own(tmp_path):
    encoded = _encoded(tmp_path, max_length=6)
    rows = encoded.train["input_ids"][:]

    assert encoded.train.column_names == ["input_ids"]
    # 10 letters where 4 have room: three windows, as even as can be.
    assert rows == [
        [2, 4, 5, 6, 3],
        [2, 7, 3],
        [2, 8, 9, 10, 3],
        [2, 11, 12, 13, 3],
        [2, 14, 15, 16, 17, 3],
        [2, 18, 19, 3],
    ]
    assert encoded.tokens_per_row == pytest.approx(28 / 6)


def test_an_end_marker_is_no_part_of_a_window(tmp_path):
    encoded = _encoded(tmp_path, _tokenizer(eos_token=SPECIAL[1]))

    assert encoded.train["input_ids"][1] == [2, 7, 3]


def test_a_window_without_room_for_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"task\.max_length is 2, but the tokenizer adds 2 special"):
        _encoded(tmp_path, max_length=2)


def test_a_micro_batch_for_mlm_attends_to_its_text_and_has_no_labels_yet():
    batch = Collator(_tokenizer(), _task())([{"input_ids": [2, 5, 3]}], dummy_rows=1)

    assert batch.inputs["input_ids"].tolist() == [[2, 5, 3, *[0] * 5], [0] * 8]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, *[0] * 5], [1, *[0] * 7]]
    assert batch.valid.sum(dim=1).tolist() == [3, 0]
    assert batch.labels.tolist() == [[-100] * 8] * 2
