"""Mixed text: the teacher's micro-batches, each word of which one of two vocabularies cuts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, Batch
from megakd.data.collation import Collator
from megakd.data.masking import task_masking
from megakd.data.tokenizers import VocabularyPair
from megakd.data.vocabularies import train_tokenizer
from megakd.data.words import WORD_STARTS
from megakd.methods.mixed_vocabulary.mixed_text import MixedText, encode_mixed

COMMON = [" ".join("abcdefgh"), "face bad cafe head", "feed bee, gag!"] * 3
LENGTH = 24
TEXTS = st.lists(st.text("abcdefghxyж ", min_size=1, max_size=60), min_size=1, max_size=5)
PROBABILITIES = st.sampled_from([0.0, 0.3, 1.0])
WHOLE = pytest.mark.parametrize("whole_words", [False, True], ids=["pieces", "whole words"])


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
        self.pair, self.task = pair, task(**keys)
        self.texts = texts
        rows = Dataset.from_dict({"text": texts})
        made, _ = encode_mixed(rows, pair, self.task, content_hash="", cache_dir=folder)
        self.rows: Any = made.with_format("arrow")

    def batch(
        self,
        numbers: Any = None,
        *,
        probability: float = 0.5,
        size: int | None = None,
        draw: int = 0,
        seed: int = 1,
    ) -> Batch:
        numbers = np.arange(len(self.rows)) if numbers is None else np.array(numbers, dtype=int)
        mixed = MixedText(self.pair, self.task, probability=probability)
        rows = self.rows[numbers] if len(numbers) else {}
        size = len(numbers) if size is None else size
        return mixed(rows, numbers, size=size, seed=seed, draw=draw)

    def teacher_alone(self, *, seed: int, draw: int, dummy_rows: int = 0) -> Batch:
        """The batch of the teacher's tokenizer, on rows made of the same words."""
        rows = []
        for row in self.rows.with_format(None):
            lengths = [1, *row["teacher_lengths"], 1]
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            cls, sep = self.pair.teacher.cls_token_id, self.pair.teacher.sep_token_id
            ids = {"input_ids": [cls, *row["teacher_ids"], sep]}
            rows.append(ids | ({WORD_STARTS: starts} if self.task.whole_word_masking else {}))
        batch = Collator(self.pair.teacher, self.task)(rows, dummy_rows=dummy_rows)
        masking = task_masking(self.pair.teacher, self.task)
        assert masking is not None
        return masking(batch, np.arange(len(rows)), seed=seed, draw=draw)

    def plain(self, batch: Batch) -> torch.Tensor:
        """The numbers [B, T] that stood under the masks."""
        ids = torch.where(batch.labels == IGNORE, batch.inputs["input_ids"], batch.labels)
        positions, labels = second(batch)
        ids.view(-1)[positions] = torch.from_numpy(labels) + self.pair.offset
        return ids

    def words(self, batch: Batch) -> list[list[tuple[str, bool]]]:
        """By row, the words and whether the student's vocabulary cut them."""
        return [
            self.row_words(ids[valid].tolist()[1:-1])
            for ids, valid in zip(self.plain(batch), batch.valid, strict=True)
        ]

    def row_words(self, ids: list[int]) -> list[tuple[str, bool]]:
        words: list[tuple[str, bool]] = []
        for number in ids:
            is_student = number >= self.pair.offset
            tokenizer = self.pair.student if is_student else self.pair.teacher
            piece = str(
                tokenizer.convert_ids_to_tokens(number - self.pair.offset * int(is_student))
            )
            if piece.startswith("##"):
                assert words[-1][1] == is_student
                words[-1] = (words[-1][0] + piece[2:], is_student)
            else:
                words.append((piece, is_student))
        return words


def second(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The positions and labels of the student's pieces, without the position that only fills up."""
    if batch.extras.second is None:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    has_label = (batch.extras.second.labels != IGNORE).numpy()
    return batch.extras.second.positions.numpy()[has_label], batch.extras.second.labels.numpy()[
        has_label
    ]


def chosen(batch: Batch) -> torch.Tensor:
    """[B, T] bool: all positions that are predicted, in either vocabulary."""
    found = batch.labels != IGNORE
    found.view(-1)[second(batch)[0]] = True
    return found


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


@WHOLE
@given(texts=TEXTS, seed=st.integers(0, 99), draw=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_with_probability_0_the_batch_is_the_one_of_the_teachers_tokenizer(
    pair, tmp_path_factory, whole_words, texts, seed, draw
):
    # The teacher does not know x: such words are unknown to it, as in any text of its own.
    texts = ["bad", *texts]
    scene = Scene(pair, texts, tmp_path_factory.mktemp("c"), whole_word_masking=whole_words)
    alone = scene.teacher_alone(seed=seed, draw=draw, dummy_rows=2)

    size = len(scene.rows) + 2
    batch = scene.batch(probability=0.0, size=size, seed=seed, draw=draw)

    assert list(batch.inputs) == list(alone.inputs)
    assert all(torch.equal(batch.inputs[name], alone.inputs[name]) for name in alone.inputs)
    assert torch.equal(batch.labels, alone.labels)
    assert torch.equal(batch.valid, alone.valid)
    assert batch.targets is not None
    assert alone.targets is not None
    assert torch.equal(batch.targets, alone.targets)
    assert batch.extras.second is None


@given(texts=TEXTS, probability=PROBABILITIES.filter(bool), draw=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
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
        assert not (is_student and ("y" in word or word == "[UNK]"))
        assert is_student or "x" not in word


def test_with_probability_1_the_teachers_pieces_are_special_or_unknown_to_the_student(
    pair, tmp_path
):
    scene = Scene(pair, ["bad faced bay", "ax ж by head"], tmp_path)

    words = scene.words(scene.batch(probability=1.0))

    assert words == [
        [("bad", True), ("faced", True), ("bay", False)],
        [("ax", True), ("[UNK]", False), ("by", False), ("head", True)],
    ]


@WHOLE
@given(texts=TEXTS, cuts=st.lists(st.integers(0, 12), max_size=3), spare=st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_words_and_masks_do_not_depend_on_micro_batches_and_padding(
    pair, tmp_path_factory, whole_words, texts, cuts, spare
):
    scene = Scene(
        pair, ["bad", *texts], tmp_path_factory.mktemp("c"), whole_word_masking=whole_words
    )
    bounds = [0, *sorted(min(cut, len(scene.rows)) for cut in cuts), len(scene.rows)]

    parts = [
        scene.batch(range(first, last), size=last - first + spare)
        for first, last in pairwise(bounds)
        if last - first + spare
    ]

    rows = [row for part in parts for row in per_row(part)]
    assert rows == per_row(scene.batch())


def test_the_order_of_the_rows_changes_no_row(many):
    order = np.random.default_rng(1).permutation(len(many.rows))

    shuffled = per_row(many.batch(order))

    rows = per_row(many.batch())
    assert shuffled == [rows[number] for number in order]


@pytest.mark.parametrize("changed", [{"draw": 1}, {"seed": 2}], ids=["draw", "seed"])
def test_another_draw_or_seed_cuts_the_words_anew(many, changed):
    first, other = (
        np.array([is_student for row in many.words(batch) for _, is_student in row])
        for batch in (many.batch(), many.batch(**changed))
    )

    assert near(int((first != other).sum()), len(first), 0.5)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_of_the_students_words_is_the_probability(many, probability):
    words = [word for row in many.words(many.batch(probability=probability)) for word in row]

    assert near(sum(is_student for _, is_student in words), len(words), probability)


@WHOLE
def test_pieces_of_both_vocabularies_are_masked_alike(pair, many, tmp_path, whole_words):
    # Rows are long: the one word that every row masks at least adds little to the share.
    keys = {"whole_word_masking": whole_words, "max_length": 256}
    scene = Scene(pair, many.texts, tmp_path, **keys)
    batch = scene.batch()
    ids, shown, masked = scene.plain(batch), batch.inputs["input_ids"], chosen(batch)
    special = torch.isin(ids, torch.tensor(pair.teacher.all_special_ids))

    for of_student in (False, True):
        ours = (ids >= pair.offset) == of_student
        mine = masked & ours
        # Whole words are chosen together, so the number of tries is smaller.
        tries = int((ours & ~special & batch.valid).sum()) / (5 if whole_words else 1)
        assert near(int(mine.sum()) / (5 if whole_words else 1), tries, 0.15)
        hidden = shown[mine] == pair.teacher.mask_token_id
        assert near(int(hidden.sum()), int(mine.sum()), 0.8)
        replaced = shown[mine & (shown != ids) & (shown != pair.teacher.mask_token_id)]
        vocabulary = pair.student if of_student else pair.teacher
        numbers = replaced - pair.offset * int(of_student)
        assert near(len(replaced), int(mine.sum()), 0.1)
        assert 0 <= int(numbers.min()) < int(numbers.max()) < len(vocabulary)
        assert not torch.isin(numbers, torch.tensor(vocabulary.all_special_ids)).any()


def test_labels_of_the_student_are_in_its_own_numbering_and_no_labels_of_the_teacher(many):
    batch = many.batch()
    positions, labels = second(batch)

    assert 0 <= labels.min() <= labels.max() < len(many.pair.student)
    assert (batch.labels.flatten()[positions] == IGNORE).all()
    assert batch.targets is not None
    assert torch.equal(batch.targets, (batch.labels.flatten() != IGNORE).nonzero()[:, 0])
    assert int(batch.labels.max()) < many.pair.offset
    assert (np.diff(positions) > 0).all()


def test_the_text_under_the_masks_does_not_depend_on_the_masks(pair, many, tmp_path):
    more = Scene(pair, many.texts, tmp_path, mlm_probability=0.9)

    few_masks, many_masks = many.batch(), more.batch()

    assert chosen(many_masks).sum() > 4 * chosen(few_masks).sum()
    assert torch.equal(more.plain(many_masks), many.plain(few_masks))


def test_all_pieces_of_a_word_are_chosen_together_with_whole_word_masking(pair, many, tmp_path):
    scene = Scene(pair, many.texts, tmp_path, whole_word_masking=True)
    batch = scene.batch()
    starts_word = np.array(
        [
            not str(token).startswith("##")
            for tokenizer in (pair.teacher, pair.student)
            for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        ]
    )

    for ids, mask, valid in zip(scene.plain(batch), chosen(batch), batch.valid, strict=True):
        word = np.cumsum(starts_word[ids[valid].numpy()])
        by_word = np.bincount(word, weights=mask[valid].numpy()) / np.bincount(word).clip(1)
        assert set(by_word.tolist()) <= {0.0, 1.0}
    assert WORD_STARTS not in batch.inputs


@WHOLE
def test_every_row_has_a_masked_word(pair, tmp_path, whole_words):
    scene = Scene(
        pair,
        ["bad", "cabbage head", "ж", "feed bee gag"],
        tmp_path,
        mlm_probability=1e-9,
        whole_word_masking=whole_words,
    )

    batch = scene.batch()

    assert (chosen(batch).sum(dim=1) > 0).tolist() == [True, True, False, True]


@pytest.mark.parametrize("numbers", [[], [0, 1]], ids=["only dummy rows", "rows"])
def test_dummy_rows_have_no_valid_position_and_attend_to_their_first(pair, tmp_path, numbers):
    scene = Scene(pair, ["bad head", "cabbage"], tmp_path)

    batch = scene.batch(numbers, size=len(numbers) + 2)

    dummies = slice(len(numbers), None)
    assert not batch.valid[dummies].any()
    assert batch.inputs["attention_mask"][dummies].sum(dim=1).tolist() == [1, 1]
    assert (batch.labels[dummies] == IGNORE).all()
    assert batch.extras.second is not None
    assert batch.targets is not None
    assert min(len(batch.targets), len(batch.extras.second.positions)) >= 1


def test_rows_may_be_given_as_columns(pair, tmp_path):
    scene = Scene(pair, ["bad head", "cabbage"], tmp_path)
    columns = scene.rows.with_format(None)[:]
    mixed = MixedText(pair, scene.task, probability=0.5)

    batch = mixed(columns, np.arange(2), size=2, seed=1, draw=0)

    assert per_row(batch) == per_row(scene.batch())


def test_another_task_and_another_probability_are_errors(pair):
    with pytest.raises(ValueError, match="only a task of type mlm has mixed text, got causal_lm"):
        MixedText(pair, TaskConfig(type="causal_lm", dataset="none"), probability=0.5)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        MixedText(pair, task(), probability=1.5)


def test_the_cut_of_words_stays_what_it_is(pair, tmp_path):
    """Written down: a later version resumes a run with the words that it has begun with."""
    scene = Scene(pair, ["a b c d e f g h a b c d e f g h"], tmp_path)

    (words,) = scene.words(scene.batch(draw=3, seed=5))

    of_student = "".join(str(int(is_student)) for _, is_student in words)
    assert of_student == "0011110110101000"
