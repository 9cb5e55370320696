"""Texts with words of two vocabularies ("dual training"), encoded once for both.

Zhao, Gupta, Song and Zhou 2019 (arXiv 1909.11687 v1): every word of a row is cut with the student's
vocabulary with a probability, else with the teacher's. A masked piece is then predicted in its own
vocabulary.
The `Collator` of the student reads the same rows. Columns, all lists of int32:

- `input_ids`: the student's tokens with its special tokens.
- `teacher_ids`: the same words in the teacher's vocabulary, without special tokens.
- `student_lengths`, `teacher_lengths`: number of pieces of each word, without special tokens.
- `fixed`: by word, 0 if both vocabularies know the word, 1 if the student's vocabulary always cuts
  the word, 2 if the teacher's always cuts the word. See `shared_words.SharedWords`.

Shapes: B rows of a micro-batch, T positions, W words of all rows together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from megakd.config.task import TaskConfig
from megakd.data.arrow import (
    TEXTS_AT_ONCE,
    arrow_batches,
    key_of,
    read_rows,
    rows_key,
    write_tables,
)
from megakd.data.batch import Batch, BatchSource
from megakd.data.collation import Collator, Columns, columns_of, row_keys, task_masking, uniform
from megakd.data.encoding import no_tokens, tokenizer_content
from megakd.data.token_tables import (
    check_room_for_text,
    frame,
    tables_of_lists,
)
from megakd.data.tokenizers import VocabularyPair, rows_for
from megakd.errors import DataError
from megakd.methods.mixed_vocabulary.shared_words import (
    ALWAYS_STUDENT,
    FREE,
    SharedWords,
    WordCutter,
)
from megakd.process.seals import whole_folder
from megakd.training.batches import StageParts, row_batches

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


# Any number but 0, which is the domain of the masks.
_COINS = 0x6D69786564
logger = logging.getLogger(__name__)
# Part of every key: increase this number when the encoded rows would differ.
VERSION = 1
_COLUMNS = ("input_ids", "teacher_ids", "student_lengths", "teacher_lengths", "fixed")
_Row = tuple["NDArray[np.int32 | np.int64]", ...]


class MixedText:
    """A function that collates rows of `encode_mixed` to the teacher's micro-batch, masked.

    The vocabulary of a word is a pure function of (seed, draw, row, word), and a mask one of (seed,
    draw, row, position). Neither depends on the split of a step into ranks and micro-batches, or on
    the padding. With probability 0, the micro-batch is that of `Collator` and `Masking` for the
    teacher's tokenizer.

    pair: the tokenizers.
    task: a task of type mlm, as for `encode_mixed`.
    probability: probability of a word to be cut with the student's vocabulary, 0 to 1. Above 0, a
        word that only one of the vocabularies knows is always cut with that vocabulary.
    """

    def __init__(self, pair: VocabularyPair, task: TaskConfig, *, probability: float) -> None:
        second = pair.student if probability > 0 else None
        masking = task_masking(pair.teacher, task, second=second)
        if masking is None:
            raise ValueError(f"only a task of type mlm has mixed text, got {task.type}")
        self._masking = masking
        self._collate = Collator(pair.teacher, task)
        self._offset = pair.offset
        self._student, self._teacher = map(_Frame.from_tokenizer, pair)
        self._probability = probability

    def __call__(
        self,
        rows: object,
        numbers: NDArray[np.int64],
        *,
        size: int,
        seed: int,
        draw: int | NDArray[np.int64],
    ) -> Batch:
        """Return the teacher's micro-batch of `size` rows; those beyond the numbers are dummy rows.

        Args:
            rows: a slice of the rows of `encode_mixed`, as for `Collator`.
            numbers: numbers of the rows in the data set, at least 0.
            draw: number of the segmentation and of the mask, such as the epoch, for all rows or by
                row.

        Returns:
            The batch, whose `input_ids` [B, T] have joint numbers (see `VocabularyPair`). `labels`
            [B, T] and `targets` are those of the teacher's pieces. `second` has the positions of
            the student's pieces with labels in the student's own numbering.
        """
        table: object = {}
        if len(numbers):
            columns = columns_of(rows)
            words = columns["fixed"][1]
            keys = row_keys(seed, draw, numbers, size=len(numbers), domain=_COINS)
            places = _ranges(np.ones_like(words), words).astype(np.uint64)
            coins = uniform(np.repeat(keys, words), places)  # [W]
            table = self._mixed(columns, coins < self._probability)
        batch = self._collate(table, dummy_rows=size - len(numbers))
        return self._masking(batch, numbers, seed=seed, draw=draw)

    def _mixed(self, columns: Columns, heads: NDArray[np.bool_]) -> pa.Table:
        """Return the teacher's rows for the words [W] that are cut with the student's vocabulary.

        A word that only one vocabulary knows is cut with that vocabulary.
        """
        fixed, words = columns["fixed"]
        # With probability 0 the teacher has no table for the student's pieces.
        is_known = (fixed == ALWAYS_STUDENT) & (self._probability > 0)
        is_student = np.where(fixed == FREE, heads, is_known)
        lengths = np.where(is_student, columns["student_lengths"][0], columns["teacher_lengths"][0])
        teacher_starts = _sums(columns["teacher_lengths"][0])[:-1]
        # The student's words are in `input_ids`, whose rows have special tokens.
        rows = np.repeat(np.arange(len(words)), words)
        special = len(self._student.before) + rows * self._student.size
        student_starts = _sums(columns["student_lengths"][0])[:-1] + special
        teacher_ids, student_ids = columns["teacher_ids"][0], columns["input_ids"][0]
        starts = np.where(is_student, len(teacher_ids) + student_starts, teacher_starts)
        pieces = np.concatenate([teacher_ids, student_ids + self._offset])
        return _in_rows(pieces[_ranges(starts, lengths)], lengths, words, self._teacher)


class _Frame(NamedTuple):
    before: NDArray[np.int64]
    after: NDArray[np.int64]

    @staticmethod
    def from_tokenizer(tokenizer: PreTrainedTokenizerBase) -> _Frame:
        return _Frame(*(np.array(ids, dtype=np.int64) for ids in frame(tokenizer)))

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


def _sums(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [N + 1] sums of the lengths [N] before each length, and of all lengths."""
    sums = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=sums[1:])
    return sums


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    sums = _sums(lengths)
    return np.arange(sums[-1]) + np.repeat(starts - sums[:-1], lengths)


def _in_rows(
    pieces: NDArray[np.int64],
    lengths: NDArray[np.int64],
    words: NDArray[np.int64],
    special: _Frame,
) -> pa.Table:
    """Return rows of `words` [B] words of `lengths` [W] pieces, with special tokens around each."""
    bounds = _sums(lengths)[_sums(words)]
    # Position of each row's first token, and the number of tokens: all rows follow one another.
    rows = bounds + np.arange(len(bounds)) * special.size  # [B + 1]
    places = _ranges(rows[:-1] + len(special.before), np.diff(bounds))
    tokens = np.empty(rows[-1], dtype=np.int64)
    tokens[places] = pieces
    tokens[rows[:-1, None] + np.arange(len(special.before))] = special.before
    tokens[rows[1:, None] - np.arange(len(special.after), 0, -1)] = special.after
    arrow = cast("Any", pa)  # pyarrow carries no types
    of_rows = arrow.ListArray.from_arrays(arrow.array(rows.astype(np.int32)), arrow.array(tokens))
    return arrow.table({"input_ids": of_rows})


def encode_mixed(
    rows: Dataset, pair: VocabularyPair, task: TaskConfig, *, cache_dir: Path
) -> Dataset:
    """Encode training texts in both vocabularies, or reuse the result of an earlier call.

    A row is a window of whole words of one text. Every mix of the vocabularies fits in
    `task.max_length`. Words that alone do not fit in a row are left out with a warning. The encoded
    rows are memory-mapped.
    """
    for role, tokenizer in zip(pair._fields, pair, strict=True):
        check_room_for_text(rows, tokenizer, task)
        _check_numbers(role, tokenizer)
    cutter = WordCutter(pair)
    key = key_of(
        {
            "mixed version": VERSION,
            "rows": rows_key(rows),
            "student": tokenizer_content(pair.student),
            "teacher": tokenizer_content(pair.teacher),
            "max_length": task.row_length,
        }
    )
    student, teacher = map(_Frame.from_tokenizer, pair)
    room = task.row_length - max(student.size, teacher.size)

    def build(folder: Path) -> None:
        tables = tables_of_lists(_rows(rows, cutter, room, student), _COLUMNS)
        if not write_tables(folder / "train.arrow", tables):
            raise no_tokens(rows, task, split="train")

    folder = whole_folder(cache_dir / "encoded" / key, build)
    return read_rows(folder / "train.arrow")


def _rows(rows: Dataset, cutter: WordCutter, room: int, student: _Frame) -> Iterator[_Row]:
    # room: the most pieces of a row, without special tokens.
    too_long, first_word = 0, ""
    for batch in arrow_batches(rows, TEXTS_AT_ONCE):
        for words in cutter(batch.column("text").to_pylist()):
            sizes = np.maximum(words.student.lengths, words.teacher.lengths)
            fits = sizes <= room
            if not fits.all():
                first_word = first_word or words.word(int(fits.argmin()))
                too_long += int((~fits).sum())
            yield from _text_rows(words.only(fits), sizes[fits], room, student)
    if too_long:
        logger.warning(
            "%d word(s) of the training texts are left out, because task.max_length leaves room "
            "for %d pieces in a row and they have more; the first is %.60s",
            too_long,
            room,
            first_word,
        )


def _text_rows(
    words: SharedWords, sizes: NDArray[np.int64], room: int, special: _Frame
) -> Iterator[_Row]:
    """Yield the columns of the rows of a text; `sizes` are the most pieces of each word."""
    student_lengths, teacher_lengths = words.student.lengths, words.teacher.lengths
    for first, last in word_windows(sizes, room):
        part = slice(first, last)
        student, teacher = (
            pieces.ids[pieces.starts[first] : pieces.starts[last]]
            for pieces in (words.student, words.teacher)
        )
        yield (
            np.concatenate([special.before, student, special.after]),
            teacher,
            student_lengths[part],
            teacher_lengths[part],
            words.fixed[part],
        )


def word_windows(sizes: NDArray[np.int64], room: int) -> Iterator[tuple[int, int]]:
    """Yield windows of whole words with about equal numbers of pieces, as (first word, end).

    Each of the sizes [words] is a number of pieces, at most `room`; no words have no windows.
    """
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    count = max(1, -(-total // room))
    # Every window but the last has at least total / count pieces, because the next word would
    # otherwise fit. There are then at most `count` windows, unless `room` is the limit.
    limit = min(room, -(-total // count) + int(sizes.max(initial=1)) - 1)
    first = 0
    while first < len(sizes):
        before = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, before + limit, side="right"))
        yield first, last
        first = last


def _check_numbers(role: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if rows_for(tokenizer) > len(tokenizer):
        raise DataError(
            f"method.student_vocabulary: the tokenizer of the {role} has {len(tokenizer)} tokens, "
            f"and one of them has the number {rows_for(tokenizer) - 1}; use a tokenizer whose "
            "tokens are numbered without gaps"
        )


def mixed_batches(parts: StageParts) -> BatchSource:
    """Return the rows that are encoded for both vocabularies, also for a student alone."""
    prepared, config = parts.assembly.prepared, parts.assembly.config
    rows, pair = cast("Dataset", prepared.method_rows), cast("VocabularyPair", prepared.pair)
    others = {
        role: MixedText(pair, config.task, probability=probability)
        for role, probability in config.method.mixed(parts.stage).items()
    }
    return row_batches(parts, parts.of_model.prepared.encoded._replace(train=rows), others)
