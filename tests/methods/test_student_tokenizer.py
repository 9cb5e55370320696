"""Vocabularies of students: exact sizes, refusals, and words as their tokenizers cut them."""

from __future__ import annotations

import random
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from pydantic import ValidationError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megakd.data.encoding import tokenizer_content
from megakd.data.tokenizers import VocabularyPair, encoder_template, train_tokenizer
from megakd.errors import DataError
from megakd.methods.mixed_vocabulary import MixedVocabularyConfig
from megakd.methods.mixed_vocabulary import shared_words as student_tokenizer
from megakd.methods.mixed_vocabulary.shared_words import (
    WordCutter,
    check_special_tokens,
    load_student_tokenizer,
)

FIRST = "The teacher writes a letter; the student, naïve, reads 42 (short) letters!"


def _invented() -> list[str]:
    rng = random.Random(0)
    syllables = re.findall("..", "tarinokeselmibafuesingerlyprocodestunal")
    words = ["".join(rng.choices(syllables, k=rng.randrange(1, 4))) for _ in range(150)]
    return [FIRST, *(" ".join(rng.choices(words, k=8)) for _ in range(80))]


SENTENCES = _invented()
ROLES = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}


def _load(folder, size=100, texts=SENTENCES):
    rows = Dataset.from_dict({"text": list(texts) * 5})
    splits: Any = SimpleNamespace(train=rows, stream=None)
    return load_student_tokenizer(size, splits, cache_dir=folder)


def test_a_student_tokenizer_has_the_size_and_is_trained_once(tmp_path, monkeypatch):
    tokenizer = _load(tmp_path, 120)
    check_special_tokens(tokenizer, "student")
    monkeypatch.setattr(student_tokenizer, "_trained", None)

    assert len(tokenizer) == len(tokenizer.get_vocab()) == 120
    assert tokenizer_content(_load(tmp_path, 120)) == tokenizer_content(tokenizer)


def test_the_defaults_are_the_papers_and_values_outside_the_choices_are_refused():
    assert MixedVocabularyConfig(name="mixed_vocabulary").student_vocabulary == 4928
    for wrong in (99, {"size": 200}):
        with pytest.raises(ValidationError):
            MixedVocabularyConfig(name="mixed_vocabulary", student_vocabulary=wrong)


@pytest.mark.parametrize("texts", [[""], ["a"], SENTENCES], ids=["nothing", "a letter", "little"])
def test_too_little_text_is_an_error_that_names_the_number_of_pieces(tmp_path, texts):
    message = (
        r"the training text gives only \d+ pieces.*occur at least twice"
        r".*method\.student_vocabulary is 5000; lower .*, or give more text"
    )
    with pytest.raises(DataError, match=message):
        _load(tmp_path, 5000, texts)


def test_more_characters_than_pieces_is_an_error_that_names_the_smallest_size(tmp_path):
    varied = [" ".join(chr(0x400 + n) for n in range(48, 200)), *SENTENCES]
    message = r"take \d+ pieces, and method\.student_vocabulary is 100; set"
    with pytest.raises(DataError, match=message) as error:
        _load(tmp_path, 100, varied)

    smallest = int(str(error.value).rsplit(" ", 1)[1])
    assert len(_load(tmp_path, smallest, varied)) == smallest
    with pytest.raises(DataError, match=f"to at least {smallest}"):
        _load(tmp_path, smallest - 1, varied)


def _word_level(vocabulary, *, template=("[CLS]", "[SEP]"), roles=()) -> PreTrainedTokenizerFast:
    numbers = {word: number for number, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(numbers, unk_token=ROLES["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = encoder_template(backend, cls=template[0], sep=template[1])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**ROLES, **dict(roles)})


def test_overlap_is_the_share_of_the_pieces_that_the_teacher_has():
    student = _word_level([*ROLES.values(), "the", "##s", "s", "cat"])
    teacher = _word_level(["[unused0]", *ROLES.values(), "the", "##s", "dog", "##cat", "a"])

    assert VocabularyPair(student, teacher).overlap == 0.5
    assert VocabularyPair(teacher, student).overlap == 2 / 6
    assert VocabularyPair(student, student).overlap == 1.0


WORDS = [*ROLES.values(), "a"]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        *(
            (
                _word_level(WORDS, roles={f"{role}_token": None}),
                rf"^student: the tokenizer has no {role} token \(None\); set {role}_token in",
            )
            for role in ("pad", "unk", "cls", "sep", "mask")
        ),
        (
            _word_level(WORDS, roles={"sep_token": "[PAD]"}),
            r"student: \[PAD\] is both the pad token and the sep token",
        ),
        (
            _word_level(WORDS, roles={"cls_token": "[SEP]", "sep_token": "[CLS]"}),
            r"student: an encoded text begins with \[CLS\] .* cls token is \[SEP\]",
        ),
        (
            _word_level(WORDS, template=("[CLS]", "[MASK]")),
            r"ends with \[MASK\], and .* its sep token \[SEP\]",
        ),
    ],
)
def test_special_tokens_that_are_missing_or_in_wrong_places_are_refused(tokenizer, message):
    with pytest.raises(DataError, match=message):
        check_special_tokens(tokenizer, "student")


TEXT = "the unbelievable cats, it isn't naïve"
CUTS = {
    "wordpiece": "the|unbelievable|cats|,|it|isn|'|t|naïve",
    "bpe": "the|unbelievable|cats|,|it|isn|'t|naïve",
}


@cache
def trained(kind: Any) -> PreTrainedTokenizerFast:
    letters = [*TEXT, "abcdefghijklmnopqrstuvwxyz", "able cat the it is"] * 3
    return train_tokenizer(lambda: letters, kind=kind, vocab_size=300, for_encoder=True)


def words_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    (words,) = WordCutter(VocabularyPair(tokenizer, tokenizer))([text])
    return [words.word(number).strip() for number in range(len(words.fixed))]


@pytest.mark.parametrize("kind", list(CUTS))
def test_a_word_is_what_the_tokenizer_cuts_off_before_it_looks_for_pieces(kind):
    assert "|".join(words_of(trained(kind), TEXT)) == CUTS[kind]
