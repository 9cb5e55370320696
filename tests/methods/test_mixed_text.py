"""Text in two vocabularies: rows of the same words in both, and micro-batches of a mix."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_tokenizer import Words
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.data.batch import IGNORE, Batch
from megakd.data.collation import Collator, task_masking
from megakd.data.tokenizers import VocabularyPair, train_tokenizer
from megakd.errors import DataError
from megakd.methods.mixed_vocabulary import mixed_text
from megakd.methods.mixed_vocabulary.mixed_text import MixedText, encode_mixed
from megakd.methods.mixed_vocabulary.shared_words import ALWAYS_STUDENT, ALWAYS_TEACHER, FREE

COMMON = [" ".join("abcdefgh"), "face bad cafe head", "feed bee, gag!"] * 3
LENGTH = 24
TEXTS = st.lists(st.text("abcdefghxyж ", min_size=1, max_size=60), min_size=1, max_size=5)


def trained(texts: list[str], size: int) -> PreTrainedTokenizerBase:
    return train_tokenizer(lambda: texts, kind="wordpiece", vocab_size=size, for_encoder=True)


@pytest.fixture(scope="module")
def pair() -> VocabularyPair:
    """Only the student knows words with x, and only the teacher knows words with y."""
    return VocabularyPair(trained([*COMMON, "x"], 28), trained([*COMMON, "y", "faced", "y"], 60))


def task(**keys: Any) -> TaskConfig:
    given: Any = {"max_length": LENGTH} | keys
    return TaskConfig(type="mlm", dataset="none", **given)


class Scene:
    """Encoded texts, and the micro-batches that are made of their rows."""

    def __init__(self, pair: VocabularyPair, texts: list[str], folder: Path, **keys: Any) -> None:
        self.pair, self.task, self.texts = pair, task(**keys), texts
        self.rows = encoded(texts, pair, folder, **keys).with_format("arrow")

    def batch(
        self, numbers: Any = None, *, probability: float = 0.5, spare: int = 0, **draws: int
    ) -> Batch:
        numbers = np.arange(len(self.rows)) if numbers is None else np.array(numbers, dtype=int)
        rows = self.rows[numbers] if len(numbers) else {}
        size = len(numbers) + spare
        mixed = MixedText(self.pair, self.task, probability=probability)
        return mixed(rows, numbers, size=size, **{"seed": 1, "draw": 0, **draws})

    def teacher_alone(self, *, seed: int, draw: int, dummy_rows: int = 0) -> Batch:
        """The batch of the teacher's tokenizer, on rows made of the same words."""
        cls, sep = self.pair.teacher.cls_token_id, self.pair.teacher.sep_token_id
        rows = [
            {"input_ids": [cls, *row["teacher_ids"], sep]} for row in self.rows.with_format(None)
        ]
        batch = Collator(self.pair.teacher, self.task)(rows, dummy_rows=dummy_rows)
        masking = task_masking(self.pair.teacher, self.task)
        return masking(batch, np.arange(len(rows)), seed=seed, draw=draw)

    def plain(self, batch: Batch) -> torch.Tensor:
        """The numbers [B, T] that stood under the masks."""
        ids = torch.where(batch.labels == IGNORE, batch.inputs["input_ids"], batch.labels)
        positions, labels = second(batch)
        ids.view(-1)[positions] = torch.from_numpy(labels) + self.pair.offset
        return ids

    def words(self, batch: Batch) -> list[list[tuple[str, bool]]]:
        """By row, the words and whether the student's vocabulary cut them."""
        rows: list[list[tuple[str, bool]]] = []
        for ids, valid in zip(self.plain(batch), batch.valid, strict=True):
            words: list[tuple[str, bool]] = []
            for number in ids[valid].tolist()[1:-1]:
                is_student = number >= self.pair.offset
                tokenizer = self.pair.student if is_student else self.pair.teacher
                offset = self.pair.offset if is_student else 0
                piece = str(tokenizer.convert_ids_to_tokens(number - offset))
                if piece.startswith("##"):
                    assert words[-1][1] == is_student
                    words[-1] = (words[-1][0] + piece[2:], is_student)
                else:
                    words.append((piece, is_student))
            rows.append(words)
        return rows


def second(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The positions and labels of the student's pieces, without the position that only fills up."""
    more = batch.second
    if more is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    has_label = more.labels != IGNORE
    return more.positions[has_label].numpy(), more.labels[has_label].numpy()


def chosen(batch: Batch) -> torch.Tensor:
    """[B, T] bool: all positions that are predicted, in either vocabulary."""
    result = batch.labels != IGNORE
    result.view(-1)[second(batch)[0]] = True
    return result


def per_row(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Each real row without its padding: numbers, labels, and the student's labels."""
    others = torch.full_like(batch.labels, IGNORE)
    positions, labels = second(batch)
    others.view(-1)[positions] = torch.from_numpy(labels)
    rows = zip(batch.inputs["input_ids"], batch.labels, others, batch.valid, strict=True)
    return [(a[v].tolist(), b[v].tolist(), c[v].tolist()) for a, b, c, v in rows if v.any()]


@pytest.fixture(scope="module")
def many(pair, tmp_path_factory) -> Scene:
    """Rows of about 10,000 words of one to five letters, which both vocabularies know."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), size=1 + n % 5)) for n in range(10_000)]
    texts = [" ".join(words[n : n + 100]) for n in range(0, len(words), 100)]
    return Scene(pair, texts, tmp_path_factory.mktemp("many"))


# Five standard deviations of a share p among n: 5 sqrt(p (1 - p) / n).
def near(count: float, of: float, share: float) -> bool:
    return abs(count / of - share) < 5 * (share * (1 - share) / of) ** 0.5


@given(texts=TEXTS, seed=st.integers(0, 99), draw=st.integers(0, 3))
@settings(max_examples=10, deadline=None)
def test_with_probability_0_the_batch_is_the_one_of_the_teachers_tokenizer(
    pair, tmp_path_factory, texts, seed, draw
):
    # The teacher does not know x: such words are unknown to it, as in any text of its own.
    texts = ["bad", *texts]
    scene = Scene(pair, texts, tmp_path_factory.mktemp("c"))
    alone = scene.teacher_alone(seed=seed, draw=draw, dummy_rows=2)

    batch = scene.batch(probability=0.0, spare=2, seed=seed, draw=draw)

    assert list(batch.inputs) == list(alone.inputs)
    assert all(torch.equal(batch.inputs[name], alone.inputs[name]) for name in alone.inputs)
    for part in ("labels", "valid", "targets"):
        assert torch.equal(getattr(batch, part), getattr(alone, part))
    assert batch.second is None


@given(texts=TEXTS, probability=st.sampled_from([0.3, 1.0]), draw=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_the_words_are_the_same_whatever_the_coins_and_no_vocabulary_cuts_an_unknown_word(
    pair, tmp_path_factory, texts, probability, draw
):
    scene = Scene(pair, ["bad", *texts], tmp_path_factory.mktemp("c"), max_length=80)

    words = scene.words(scene.batch(probability=probability, draw=draw))

    wanted = [text.split() for text in scene.texts if text.split()]
    unknown = [["ж" in word or {"x", "y"} <= {*word} for word in row] for row in wanted]
    assert [[word for word, _ in row] for row in words] == [
        ["[UNK]" if bad else word for word, bad in zip(*row, strict=True)]
        for row in zip(wanted, unknown, strict=True)
    ]
    for word, is_student in (entry for row in words for entry in row):
        must_be_teacher = "y" in word or word == "[UNK]"
        assert not (is_student and must_be_teacher)
        assert is_student or "x" not in word
        assert is_student or must_be_teacher or probability < 1


@given(texts=TEXTS, cuts=st.lists(st.integers(0, 12), max_size=3), spare=st.integers(0, 2))
@settings(max_examples=10, deadline=None)
def test_words_and_masks_do_not_depend_on_micro_batches_and_padding(
    pair, tmp_path_factory, texts, cuts, spare
):
    scene = Scene(pair, ["bad", *texts], tmp_path_factory.mktemp("c"))
    bounds = [0, *sorted(min(cut, len(scene.rows)) for cut in cuts), len(scene.rows)]

    parts = [
        scene.batch(range(first, last), spare=spare)
        for first, last in pairwise(bounds)
        if last - first + spare
    ]

    rows = [row for part in parts for row in per_row(part)]
    assert rows == per_row(scene.batch())


@pytest.mark.parametrize(("probability", "changed"), [(0.1, {"draw": 1}), (0.5, {"seed": 2})])
def test_as_many_words_as_likely_are_the_students_and_each_draw_cuts_anew(
    many, changed, probability
):
    first, other = (
        np.array([is_student for row in many.words(batch) for _, is_student in row])
        for batch in (many.batch(probability=probability, **keys) for keys in ({}, changed))
    )

    assert near(first.sum(), len(first), probability)
    assert near((first != other).sum(), len(first), 2 * probability * (1 - probability))


def test_pieces_of_both_vocabularies_are_masked_alike(pair, many, tmp_path):
    # Rows are long: the one token that every row masks at least adds little to the share.
    scene = Scene(pair, many.texts, tmp_path, max_length=256)
    batch = scene.batch()
    ids, shown, masked = scene.plain(batch), batch.inputs["input_ids"], chosen(batch)
    special = torch.isin(ids, torch.tensor(pair.teacher.all_special_ids))

    for of_student in (False, True):
        ours = (ids >= pair.offset) == of_student
        mine = masked & ours
        assert near(int(mine.sum()), int((ours & ~special & batch.valid).sum()), 0.15)
        hidden = shown[mine] == pair.teacher.mask_token_id
        assert near(int(hidden.sum()), int(mine.sum()), 0.8)
        replaced = shown[mine & (shown != ids) & (shown != pair.teacher.mask_token_id)]
        vocabulary = pair.student if of_student else pair.teacher
        numbers = replaced - pair.offset * int(of_student)
        assert near(len(replaced), int(mine.sum()), 0.1)
        assert 0 <= int(numbers.min()) < int(numbers.max()) < len(vocabulary)
        assert not torch.isin(numbers, torch.tensor(vocabulary.all_special_ids)).any()
    # Labels of the student are in its own numbering, and no labels of the teacher.
    positions, labels = second(batch)
    assert 0 <= labels.min() <= labels.max() < len(many.pair.student)
    assert (batch.labels.flatten()[positions] == IGNORE).all()
    assert torch.equal(batch.targets, (batch.labels.flatten() != IGNORE).nonzero()[:, 0])
    assert int(batch.labels.max()) < many.pair.offset
    assert (np.diff(positions) > 0).all()


@pytest.mark.parametrize("numbers", [[], [0, 1]], ids=["only dummy rows", "rows"])
def test_dummy_rows_have_no_valid_position_and_attend_to_their_first(pair, tmp_path, numbers):
    scene = Scene(pair, ["bad head", "cabbage"], tmp_path)

    batch = scene.batch(numbers, spare=2)

    dummies = slice(len(numbers), None)
    assert not batch.valid[dummies].any()
    assert batch.inputs["attention_mask"][dummies].sum(dim=1).tolist() == [1, 1]
    assert (batch.labels[dummies] == IGNORE).all()
    assert min(len(batch.targets), len(batch.second.positions)) >= 1


RAW_TEXTS = st.lists(st.text("abcdefghxyж ,\u0301\n", max_size=80), min_size=1, max_size=4)


def encoded(texts: list[str], given_pair: VocabularyPair, folder: Path, **keys: Any) -> Any:
    rows = Dataset.from_dict({"text": texts})
    return encode_mixed(rows, given_pair, task(**keys), cache_dir=folder)


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def joined(lists: Iterable[list[int]]) -> list[int]:
    return [number for numbers in lists for number in numbers]


def fitting_words(pair: VocabularyPair, texts: list[str], *, room: int) -> list[list[list[int]]]:
    """By vocabulary, the pieces of each word that fits in a row."""
    bert: Any = pair.teacher.backend_tokenizer
    both = [
        (pieces(pair.student, word), pieces(pair.teacher, word))
        for text in texts
        for word, _ in bert.pre_tokenizer.pre_tokenize_str(bert.normalizer.normalize_str(text))
    ]
    fitting = [cut for cut in both if max(map(len, cut)) <= room]
    return [[cut[number] for cut in fitting] for number in range(2)]


@given(texts=RAW_TEXTS, length=st.integers(4, 24))
@settings(max_examples=12, deadline=None)
def test_no_word_is_lost_or_cut_and_every_mix_of_vocabularies_fits(
    pair, tmp_path_factory, texts, length
):
    texts = ["a Cabbage, faced. head", *texts]
    rows = encoded(texts, pair, tmp_path_factory.mktemp("cache"), max_length=length)

    student, teacher = fitting_words(pair, texts, room=length - 2)
    # The student reads the pieces that its tokenizer alone would give.
    assert joined(ids[1:-1] for ids in rows["input_ids"]) == joined(student)
    assert joined(rows["teacher_ids"]) == joined(teacher)
    assert joined(rows["student_lengths"]) == list(map(len, student))
    assert joined(rows["teacher_lengths"]) == list(map(len, teacher))
    for row in rows:
        most = np.maximum(row["student_lengths"], row["teacher_lengths"])
        assert most.sum() + 2 <= length
        assert sum(row["student_lengths"]) == len(row["input_ids"]) - 2


def test_a_word_of_one_vocabulary_is_marked_and_one_of_none_is_the_teachers(pair, tmp_path):
    row = encoded(["bad ax by xy ж"], pair, tmp_path)[0]

    assert row["fixed"] == [FREE, ALWAYS_STUDENT, *[ALWAYS_TEACHER] * 3]
    unknown = pair.teacher.unk_token_id
    assert row["teacher_ids"][-2:] == [unknown, unknown]


def test_a_word_too_long_for_a_row_is_left_out_with_a_warning(pair, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows = encoded(["bad abgehchgba bee", "hhhhhhhhhhh"], pair, tmp_path, max_length=8)

    assert joined(rows["teacher_ids"]) == pieces(pair.teacher, "bad bee")
    assert [record.getMessage() for record in caplog.records] == [
        "2 word(s) of the training texts are left out, because task.max_length leaves room for 6 "
        "pieces in a row and they have more; the first is abgehchgba"
    ]


@pytest.mark.parametrize(
    ("text", "part", "message"),
    [
        (
            "face head a bad'ge bee",
            pre_tokenizers.WhitespaceSplit(),
            'word 4 and those after it are "bad | \' | ge" for the student and '
            '"bad\'ge | bee" for the teacher; use a WordPiece teacher',
        ),
        (
            "face head a bad'ge bee",
            normalizers.Replace("head", ""),
            'word 2 and those after it are "head | a | bad" for the student and "a | bad | ',
        ),
        (
            "face Bad",
            normalizers.BertNormalizer(lowercase=False),
            'of "Bad" join to "bad" for the student and to "Bad" for',
        ),
    ],
    ids=["pre-tokenizer", "missing word", "spelling"],
)
def test_texts_cut_into_different_words_are_refused_with_both_cuts(
    pair, tmp_path, text, part, message
):
    teacher = trained(COMMON, 60)
    teacher.add_tokens(["Bad"] if "Bad" in text else [])
    is_splitting = isinstance(part, pre_tokenizers.PreTokenizer)
    name = "pre_tokenizer" if is_splitting else "normalizer"
    setattr(teacher.backend_tokenizer, name, part)  # type: ignore[attr-defined]

    with pytest.raises(DataError, match=re.escape(message)) as error:
        encoded(["bad", text], pair._replace(teacher=teacher), tmp_path)

    assert "method.student_vocabulary: the two vocabularies" in str(error.value)
    assert not list((tmp_path / "encoded").iterdir())


def test_texts_and_tokenizers_that_cannot_be_encoded_are_refused(pair, tmp_path, monkeypatch):
    gaps = trained(COMMON, 28)
    monkeypatch.setattr(gaps, "get_vocab", lambda: {"[UNK]": 0, "a": 99})
    no_words = r"student_vocabulary: the tokenizer of the {} is a W"
    refused: list[tuple[dict[str, Any], str, int, str]] = [
        ({}, " ", LENGTH, "the train split has 2 rows and no tokens; check that"),
        ({}, "a", 2, r"task\.max_length is 2, but the tokenizer adds 2 special"),
        ({"student": Words()}, "a", LENGTH, no_words.format("student")),
        ({"teacher": Words()}, "a", LENGTH, no_words.format("teacher")),
        ({"student": gaps}, "a", LENGTH, r"student has \d+ tokens, and one .* number 9"),
    ]

    for changed, text, length, message in refused:
        with pytest.raises(DataError, match=message):
            encoded(["", text], pair._replace(**changed), tmp_path, max_length=length)
    assert len(encoded(["", "bad", " \n"], pair, tmp_path)) == 1


def test_whatever_changes_the_rows_changes_the_key_and_equal_rows_are_read(
    pair, tmp_path, monkeypatch
):
    other = trained(COMMON, 40)

    def rows_and_key(text="bad", pair=pair, **keys: Any) -> tuple[Any, str]:
        rows = encoded([text], pair, tmp_path, **keys)
        return rows, rows.cache_files[0]["filename"]

    first, key = rows_and_key()
    others = [
        rows_and_key("bed"),
        rows_and_key(pair=pair._replace(student=other)),
        rows_and_key(pair=pair._replace(teacher=other)),
        rows_and_key(max_length=17),
    ]
    monkeypatch.setattr(mixed_text, "write_tables", None)

    assert len({key, *(another for _, another in others)}) == 1 + len(others)
    assert rows_and_key()[0].to_dict() == first.to_dict()
