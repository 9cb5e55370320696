"""Vocabularies of students: exact sizes, and what is refused."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from pydantic import ValidationError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megakd.contract.options import StudentVocabulary
from megakd.data.encoding import tokenizer_content
from megakd.data.tokenizers import VocabularyPair
from megakd.data.vocabularies import encoder_template
from megakd.errors import DataError
from megakd.methods.mixed_vocabulary import tokenizer as student_tokenizer
from megakd.methods.mixed_vocabulary.tokenizer import check_special_tokens, load_student_tokenizer

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
    splits: Any = SimpleNamespace(train=rows, content_hash="content", stream=None)
    return load_student_tokenizer(StudentVocabulary(size=size), splits, cache_dir=folder)


def test_a_student_tokenizer_has_the_size_and_is_trained_once(tmp_path, monkeypatch):
    tokenizer = _load(tmp_path, 120)
    check_special_tokens(tokenizer, "student")
    monkeypatch.setattr(student_tokenizer, "_trained", None)

    assert len(tokenizer) == len(tokenizer.get_vocab()) == 120
    assert tokenizer_content(_load(tmp_path, 120)) == tokenizer_content(tokenizer)


def test_the_defaults_are_the_papers_and_values_outside_the_choices_are_refused():
    assert StudentVocabulary() == StudentVocabulary(type="wordpiece", size=4928)
    for wrong in ({"size": 99}, {"type": "unigram"}, {"vocab_size": 200}):
        with pytest.raises(ValidationError):
            StudentVocabulary(**wrong)


# 150 characters, of which a vocabulary of 1000 pieces keeps only the 100 most frequent.
VARIED = [" ".join(chr(0x4E00 + n) * 2 for n in range(150)), *SENTENCES]


@pytest.mark.parametrize("texts", [SENTENCES, VARIED], ids=["few words", "many characters"])
def test_too_little_text_is_an_error_that_names_the_largest_size(tmp_path, texts):
    message = (
        r"the training text gives only \d+ pieces.*occur at least twice"
        r".*method\.student_vocabulary\.size is 5000; "
        r"set method\.student_vocabulary\.size to at most \d+, or give more text"
    )
    with pytest.raises(DataError, match=message) as error:
        _load(tmp_path, 5000, texts)

    largest = int(str(error.value).rsplit("at most ", 1)[1].split(",")[0])
    assert len(_load(tmp_path, largest, texts)) == largest
    with pytest.raises(DataError, match=f"gives only {largest} pieces"):
        _load(tmp_path, largest + 1, texts)


def test_more_characters_than_pieces_is_an_error_that_names_the_smallest_size(tmp_path):
    varied = [" ".join(chr(0x400 + n) for n in range(48, 200)), *SENTENCES]
    message = r"take \d+ pieces, and method\.student_vocabulary\.size is 100; set"
    with pytest.raises(DataError, match=message) as error:
        _load(tmp_path, 100, varied)

    smallest = int(str(error.value).rsplit(" ", 1)[1])
    assert len(_load(tmp_path, smallest, varied)) == smallest
    with pytest.raises(DataError, match=f"to at least {smallest}"):
        _load(tmp_path, smallest - 1, varied)


@pytest.mark.parametrize("texts", [[""], ["a"]], ids=["nothing", "one letter"])
def test_a_text_with_hardly_a_word_is_an_error(tmp_path, texts):
    with pytest.raises(DataError, match=r"the training text gives only .*more text"):
        _load(tmp_path, 100, texts)


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


def _with_ids(vocabulary: dict[str, int]) -> Any:
    """A tokenizer whose vocabulary is not what its special tokens say."""
    return SimpleNamespace(
        **ROLES,
        get_vocab=lambda: vocabulary,
        convert_ids_to_tokens=lambda number: {n: token for token, n in vocabulary.items()}[number],
    )


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        *(
            (
                _word_level(WORDS, roles={f"{role}_token": None}),
                rf"^student: the tokenizer has no {role} token, which .*; set {role}_token in",
            )
            for role in ("pad", "unk", "cls", "sep", "mask")
        ),
        (
            _word_level(WORDS, roles={"sep_token": "[PAD]"}),
            r"student: \[PAD\] is both the pad token and the sep token",
        ),
        (
            _word_level(WORDS, roles={"cls_token": "[SEP]", "sep_token": "[CLS]"}),
            r"student: the tokenizer puts \[CLS\] first .* and \[SEP\], its cls token,",
        ),
        (
            _word_level(WORDS, template=("[CLS]", "[MASK]")),
            r"puts \[MASK\] last in an encoded text, and \[SEP\], its sep token,",
        ),
        (_with_ids({"[PAD]": 0}), r"student: the unk token \[UNK\] is not in the vocabulary"),
        (
            _with_ids({"[PAD]": 0, "x": 0}),
            r"the pad token \[PAD\] has the id 0, which is the id of x",
        ),
    ],
)
def test_special_tokens_that_are_missing_or_in_wrong_places_are_refused(tokenizer, message):
    with pytest.raises(DataError, match=message):
        check_special_tokens(tokenizer, "student")
