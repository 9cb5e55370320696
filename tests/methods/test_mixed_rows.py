"""Rows in two vocabularies: the same words in both, whole words in windows that fit every mix."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_tokenizer import Words
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.data import encoding
from megakd.data.collation import Collator
from megakd.data.encoding import encode_rows
from megakd.data.tokenizers import VocabularyPair
from megakd.data.vocabularies import train_tokenizer
from megakd.data.words import WORD_STARTS
from megakd.errors import DataError
from megakd.methods.mixed_vocabulary.mixed_text import encode_mixed, word_windows
from megakd.methods.mixed_vocabulary.shared_words import ALWAYS_STUDENT, ALWAYS_TEACHER, FREE

LETTERS = " ".join("abcdefgh")
COMMON = [LETTERS, "face bad cafe head", "feed bee, gag!"] * 3
# Only the student knows words with x, and only the teacher knows words with y.
TEXTS = st.lists(st.text("abcdefghxyж ,\u0301\n", max_size=80), min_size=1, max_size=4)


def trained(texts: list[str], size: int) -> PreTrainedTokenizerBase:
    return train_tokenizer(lambda: texts, kind="wordpiece", vocab_size=size, for_encoder=True)


@pytest.fixture(scope="module")
def pair() -> VocabularyPair:
    return VocabularyPair(trained([*COMMON, "x"], 28), trained([*COMMON, "y", "faced", "y"], 60))


def task(**keys: Any) -> TaskConfig:
    given: Any = {"max_length": 16} | keys
    return TaskConfig(type="mlm", dataset="none", **given)


def encoded(texts: list[str], given_pair: VocabularyPair, folder: Path, **keys: Any) -> Any:
    rows, _ = encode_mixed(
        Dataset.from_dict({"text": texts}),
        given_pair,
        task(**keys),
        content_hash="same",
        cache_dir=folder,
    )
    return rows


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def joined(lists: Iterable[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


def fitting_words(
    pair: VocabularyPair, texts: list[str], *, room: int
) -> tuple[list[int], list[int]]:
    """The pieces in both vocabularies of all words that fit in a row."""
    bert: Any = pair.teacher.backend_tokenizer
    both = [
        (pieces(pair.student, word), pieces(pair.teacher, word))
        for text in texts
        for word, _ in bert.pre_tokenizer.pre_tokenize_str(bert.normalizer.normalize_str(text))
    ]
    fitting = [cut for cut in both if max(map(len, cut)) <= room]
    return joined(ours for ours, _ in fitting), joined(theirs for _, theirs in fitting)


def test_a_row_has_the_tokens_of_both_tokenizers_and_the_lengths_of_its_words(pair, tmp_path):
    row = encoded(["Cabbage, faced. head"], pair, tmp_path, max_length=40)[0]
    words = ["cabbage", ",", "faced", ".", "head"]

    assert row["input_ids"] == pair.student("Cabbage, faced. head")["input_ids"]
    assert row["teacher_ids"] == pieces(pair.teacher, "Cabbage, faced. head")
    assert row["student_lengths"] == [len(pieces(pair.student, word)) for word in words]
    assert row["teacher_lengths"] == [len(pieces(pair.teacher, word)) for word in words]
    assert row["student_lengths"] != row["teacher_lengths"]
    assert WORD_STARTS not in row


def test_the_student_reads_the_rows_that_its_tokenizer_alone_would_give(pair, tmp_path):
    given_task = task(max_length=64, whole_word_masking=True)
    texts = Dataset.from_dict({"text": ["cabbage faced, a head", "bad"]})
    made, _ = encode_rows(
        {"train": texts}, pair.student, given_task, content_hash="s", cache_dir=tmp_path
    )
    mixed, _ = encode_mixed(texts, pair, given_task, content_hash="s", cache_dir=tmp_path)

    alone = Collator(pair.student, given_task)(made["train"].with_format("arrow")[:])
    batch = Collator(pair.student, given_task)(mixed.with_format("arrow")[:])

    assert list(batch.inputs) == list(alone.inputs)
    assert all((batch.inputs[name] == alone.inputs[name]).all() for name in alone.inputs)


@given(texts=TEXTS, length=st.integers(4, 24))
@settings(max_examples=60, deadline=None)
def test_no_word_is_lost_or_cut_and_every_mix_of_vocabularies_fits(
    pair, tmp_path_factory, texts, length
):
    texts = ["a", *texts]
    keys = {"max_length": length, "whole_word_masking": True}
    rows = encoded(texts, pair, tmp_path_factory.mktemp("cache"), **keys)

    student, teacher = fitting_words(pair, texts, room=length - 2)
    assert joined(ids[1:-1] for ids in rows["input_ids"]) == student
    assert joined(rows["teacher_ids"]) == teacher
    for row in rows:
        most = np.maximum(row["student_lengths"], row["teacher_lengths"])
        assert most.sum() + 2 <= length
        assert sum(row["student_lengths"]) == len(row["input_ids"]) - 2
        assert sum(row["teacher_lengths"]) == len(row["teacher_ids"])
        starts = [p for p, start in enumerate(row[WORD_STARTS]) if p == start]
        assert np.diff(starts).tolist() == [1, *row["student_lengths"]]


@given(st.lists(st.integers(1, 9), max_size=80), st.integers(9, 60))
def test_windows_of_words_lose_nothing_and_are_few_and_about_equal(sizes, room):
    cut = [*word_windows(np.array(sizes, dtype=np.int64), room)]

    assert [word for first, last in cut for word in sizes[first:last]] == sizes
    totals = [sum(sizes[first:last]) for first, last in cut]
    assert all(1 <= total <= room for total in totals)
    fewest = -(-sum(sizes) // room)
    share = -(-sum(sizes) // max(fewest, 1))
    if sizes and share + max(sizes) - 1 <= room:
        assert len(cut) <= fewest
        assert all(total >= share for total in totals[:-1])


def test_a_word_of_one_vocabulary_is_marked_and_one_of_none_is_the_teachers(pair, tmp_path):
    row = encoded(["bad ax by xy ж [MASK]"], pair, tmp_path)[0]

    assert row["fixed"] == [FREE, ALWAYS_STUDENT, *[ALWAYS_TEACHER] * 4]
    unknown = pair.teacher.unk_token_id
    assert row["teacher_ids"][-3:] == [unknown, unknown, pair.teacher.mask_token_id]


def test_a_word_too_long_for_a_row_is_left_out_with_a_warning(pair, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encoded(["bad abgehchgba bee", "hhhhhhhhhhh"], pair, tmp_path, max_length=8)

    assert joined(rows["teacher_ids"]) == pieces(pair.teacher, "bad bee")
    assert [record.getMessage() for record in caplog.records] == [
        "2 word(s) of the training texts are left out, because task.max_length leaves room for 6 "
        "pieces in a row and they have more; the first is abgehchgba"
    ]


def test_empty_texts_have_no_rows(pair, tmp_path):
    assert len(encoded(["", "bad", " \n"], pair, tmp_path)) == 1


def test_texts_without_any_token_are_refused(pair, tmp_path):
    with pytest.raises(DataError, match=r"the train split has 2 rows and no tokens; check that"):
        encoded(["", " "], pair, tmp_path)


def with_backend(tokenizer: PreTrainedTokenizerBase, **parts: Any) -> PreTrainedTokenizerBase:
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)  # type: ignore[attr-defined]
    return tokenizer


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"pre_tokenizer": pre_tokenizers.WhitespaceSplit()},
            '"bad\'ge" in "face head a bad\'ge bee" is "bad" | "\'" | "ge" for the student and '
            '"bad\'ge" for the teacher; use a WordPiece teacher',
        ),
        (
            {"normalizer": normalizers.Replace("head", "")},
            '"head" in "face head a bad\'ge bee" is "head" for the student and no word for the',
        ),
    ],
    ids=["pre-tokenizer", "missing word"],
)
def test_texts_cut_into_different_words_are_refused_with_both_cuts(pair, tmp_path, parts, message):
    other = VocabularyPair(pair.student, with_backend(trained(COMMON, 60), **parts))

    with pytest.raises(DataError) as error:
        encoded(["bad", "face head a bad'ge bee"], other, tmp_path)

    assert "method.student_vocabulary: the two vocabularies cut the text" in str(error.value)
    assert message in str(error.value)
    assert not list((tmp_path / "encoded").iterdir())


def test_a_word_spelled_differently_is_refused_with_both_spellings(pair, tmp_path):
    cased = with_backend(
        trained(COMMON, 60), normalizer=normalizers.BertNormalizer(lowercase=False)
    )
    cased.add_tokens(["Bad"])

    with pytest.raises(DataError, match=r'of "Bad" join to "bad" for the student and to "Bad" for'):
        encoded(["face Bad"], VocabularyPair(pair.student, cased), tmp_path)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_tokenizer_that_does_not_tell_words_is_refused(pair, tmp_path, role):
    with pytest.raises(DataError, match=rf"student_vocabulary: the tokenizer of the {role} is a W"):
        encoded(["a"], pair._replace(**{role: Words()}), tmp_path)


def test_a_tokenizer_whose_numbers_have_gaps_is_refused(pair, tmp_path, monkeypatch):
    student = trained(COMMON, 28)
    monkeypatch.setattr(student, "get_vocab", lambda: {"[UNK]": 0, "a": 99})

    with pytest.raises(
        DataError, match=r"student has \d+ tokens, and one of them has the number 9"
    ):
        encoded(["a"], pair._replace(student=student), tmp_path)


def test_rows_without_room_for_text_are_refused(pair, tmp_path):
    with pytest.raises(DataError, match=r"task\.max_length is 2, but the tokenizer adds 2 special"):
        encoded(["a"], pair, tmp_path, max_length=2)


def test_encoding_again_reads_what_is_there(pair, tmp_path, monkeypatch):
    first = encoded(["bad cabbage"], pair, tmp_path)
    monkeypatch.setattr(encoding, "write_tables", None)

    assert encoded(["bad cabbage"], pair, tmp_path).to_dict() == first.to_dict()


def test_whatever_changes_the_rows_changes_the_key(pair, tmp_path):
    other = trained(COMMON, 40)

    def key(texts: list[str], pair: VocabularyPair, content: str = "a", **keys: Any) -> str:
        rows = Dataset.from_dict({"text": texts})
        return encode_mixed(rows, pair, task(**keys), content_hash=content, cache_dir=tmp_path)[1]

    keys = [
        key(["bad"], pair),
        key(["bed"], pair),
        key(["bad"], pair, "b"),
        key(["bad"], pair._replace(student=other)),
        key(["bad"], pair._replace(teacher=other)),
        key(["bad"], pair, max_length=17),
        key(["bad"], pair, whole_word_masking=True),
    ]

    assert len(set(keys)) == len(keys)
