"""The teacher's micro-batches with words of two vocabularies ("dual training").

Zhao, Gupta, Song and Zhou 2019 (arXiv 1909.11687), and mixed-vocabulary training in its second
version (EACL 2021): every word of a row is cut with the student's vocabulary with a probability,
else with the teacher's. A masked piece is then predicted in its own vocabulary.
Shapes: B rows of a micro-batch, T positions, W words of all rows together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from megakd.data.encoding import Collator, Columns, columns_of
from megakd.data.masking import task_masking
from megakd.data.shared_words import ALWAYS_STUDENT, FREE
from megakd.data.splitmix import row_keys, uniform
from megakd.data.token_tables import frame
from megakd.data.words import WORD_STARTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from megakd.config.task import TaskConfig
    from megakd.contract.batch import Batch
    from megakd.data.shared_words import VocabularyPair

# Any number but 0, which is the domain of the masks.
_COINS = 0x6D69786564


class MixedText:
    """A function that collates rows of `mixed_rows` to the teacher's micro-batch, masked.

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
        if not 0 <= probability <= 1:
            raise ValueError(f"a probability is between 0 and 1, got {probability}")
        self._masking = masking
        self._collate = Collator(pair.teacher, task)
        self._offset = pair.offset
        self._student, self._teacher = (_Frame.of(*frame(tokenizer)) for tokenizer in pair)
        self._has_word_starts = task.whole_word_masking
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
        """Return the teacher's micro-batch.

        Args:
            rows: an arrow table or another slice of the rows of `encode_mixed`, as for `Collator`.
            numbers: numbers of the rows in the data set, at least 0.
            size: number of rows of the micro-batch; further rows are dummy rows.
            seed: seed of the run.
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
            coins = _coins(columns["fixed"][1], numbers, seed=seed, draw=draw)
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
        starts = np.where(is_student, self._student_starts(columns), self._teacher_starts(columns))
        pieces = [columns["teacher_ids"][0], columns["input_ids"][0] + self._offset]
        tokens = np.concatenate(pieces)[_ranges(starts, lengths)]
        layout = _Layout.of(lengths, words, self._teacher)
        made = {"input_ids": layout.framed(tokens, self._teacher)}
        if self._has_word_starts:
            made[WORD_STARTS] = layout.word_starts(lengths)
        return _table(made, layout.rows)

    def _teacher_starts(self, columns: Columns) -> NDArray[np.int64]:
        """Return the position of each word [W] in `teacher_ids`."""
        return _sums(columns["teacher_lengths"][0])[:-1]

    def _student_starts(self, columns: Columns) -> NDArray[np.int64]:
        """Return the position of each word [W] in `teacher_ids` followed by `input_ids`."""
        lengths, words = columns["student_lengths"]
        row = np.repeat(np.arange(len(words)), words)
        special = len(self._student.before) + row * self._student.size
        return len(columns["teacher_ids"][0]) + _sums(lengths)[:-1] + special


class _Frame(NamedTuple):
    """The special tokens before and after a row's pieces."""

    before: NDArray[np.int64]
    after: NDArray[np.int64]

    @staticmethod
    def of(before: list[int], after: list[int]) -> _Frame:
        return _Frame(np.array(before, dtype=np.int64), np.array(after, dtype=np.int64))

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


class _Layout(NamedTuple):
    """The places of pieces in rows with special tokens; all rows follow one another.

    rows: [B + 1] position of each row's first token, and the number of tokens.
    places: positions of the pieces.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]

    @staticmethod
    def of(lengths: NDArray[np.int64], words: NDArray[np.int64], special: _Frame) -> _Layout:
        """Return the layout of words of `lengths` [W] pieces in rows of `words` [B] words."""
        bounds = _sums(lengths)[_sums(words)]  # [B + 1]
        shifts = np.arange(len(bounds)) * special.size
        starts = bounds[:-1] + shifts[:-1] + len(special.before)
        return _Layout(bounds + shifts, _ranges(starts, np.diff(bounds)))

    def framed(self, pieces: NDArray[np.int64], special: _Frame) -> NDArray[np.int64]:
        """Return the tokens of all rows: the pieces, with special tokens around each row."""
        tokens = np.empty(self.rows[-1], dtype=np.int64)
        tokens[self.places] = pieces
        tokens[self.rows[:-1, None] + np.arange(len(special.before))] = special.before
        tokens[self.rows[1:, None] - np.arange(len(special.after), 0, -1)] = special.after
        return tokens

    def word_starts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position in its row of the first token of each token's word.

        Special tokens are words of their own.
        """
        starts = np.arange(self.rows[-1])
        starts[self.places] = np.repeat(self.places[_sums(lengths)[:-1]], lengths)
        return starts - np.repeat(self.rows[:-1], np.diff(self.rows))


def _coins(
    words: NDArray[np.int64],
    numbers: NDArray[np.int64],
    *,
    seed: int,
    draw: int | NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return a random number in [0, 1) for each word [W] of rows of `words` [B] words."""
    keys = row_keys(seed, draw, numbers, size=len(numbers), domain=_COINS)
    places = _ranges(np.ones_like(words), words).astype(np.uint64)
    return uniform(np.repeat(keys, words), places)


def _sums(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [N + 1] sums of the lengths [N] before each length, and of all lengths."""
    sums = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=sums[1:])
    return sums


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    sums = _sums(lengths)
    return np.arange(sums[-1]) + np.repeat(starts - sums[:-1], lengths)


def _table(values: dict[str, NDArray[np.int64]], bounds: NDArray[np.int64]) -> pa.Table:
    """Return rows of lists, without a copy; `bounds` [B + 1] are the bounds of the rows."""
    arrow = cast("Any", pa)  # pyarrow carries no types
    offsets = arrow.array(bounds.astype(np.int32))
    lists = {
        name: arrow.ListArray.from_arrays(offsets, arrow.array(value))
        for name, value in values.items()
    }
    return arrow.table(lists)
