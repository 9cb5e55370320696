"""Texts in the vocabularies of a student and of its teacher, encoded once, word by word.

The rows are read by `mixed_text`, which cuts each word with one of the vocabularies, and by the
`Collator` of the student. Columns, all lists of int32:

- `input_ids`: the student's tokens with its special tokens, and `word_starts` for whole-word
  masking (see `words`).
- `teacher_ids`: the same words in the teacher's vocabulary, without special tokens.
- `student_lengths`, `teacher_lengths`: number of pieces of each word, without special tokens.
- `fixed`: by word, 0 if both vocabularies know the word, 1 if the student's vocabulary always cuts
  the word, 2 if the teacher's always cuts the word. See `shared_words.SharedWords`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megakd.data.cache import key_of
from megakd.data.encoded_keys import tokenizer_content
from megakd.data.encoding import cached_tables
from megakd.data.rows import arrow_batches, rows_key
from megakd.data.shared_words import VocabularyPair, WordCutter
from megakd.data.token_tables import (
    TEXTS_AT_ONCE,
    check_room_for_text,
    frame,
    tables_of_lists,
    with_tokens,
)
from megakd.data.words import WORD_STARTS
from megakd.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from megakd.config.task import TaskConfig
    from megakd.data.shared_words import SharedWords

logger = logging.getLogger(__name__)
# Part of every key: increase this number when the encoded rows would differ.
VERSION = 1
_COLUMNS = ("input_ids", "teacher_ids", "student_lengths", "teacher_lengths", "fixed")
_Row = tuple["NDArray[np.int32 | np.int64]", ...]


def encode_mixed(
    rows: Dataset, pair: VocabularyPair, task: TaskConfig, *, content_hash: str, cache_dir: Path
) -> tuple[Dataset, str]:
    """Encode training texts in both vocabularies, or reuse the result of an earlier call.

    A row is a window of whole words of one text. Every mix of the vocabularies fits in
    `task.max_length`. Words that alone do not fit in a row are left out with a warning.

    Args:
        rows: the texts, in the column `text`.
        pair: the tokenizers; the key contains their content, not their names.
        task: the task; only `max_length` and `whole_word_masking` are used.
        content_hash: hash of the sources of the rows.
        cache_dir: folder that contains the folder named by the key.

    Returns:
        The encoded rows, memory-mapped, and the key.

    Raises:
        DataError: a tokenizer is not a fast tokenizer or its token numbers have gaps, the
            vocabularies cut a text into different words or spell a word differently, `max_length`
            leaves no room for text, the rows have no tokens, or the cache cannot be written.
    """
    for role, tokenizer in zip(pair._fields, pair, strict=True):
        check_room_for_text(rows, tokenizer, task)
        _check_numbers(role, tokenizer)
    cutter = WordCutter(pair)
    key = key_of(
        {
            "mixed version": VERSION,
            "content": content_hash,
            "rows": rows_key(rows),
            "student": tokenizer_content(pair.student),
            "teacher": tokenizer_content(pair.teacher),
            "max_length": task.row_length,
            "words": task.whole_word_masking,
        }
    )
    names = (*_COLUMNS, WORD_STARTS) if task.whole_word_masking else _COLUMNS
    tables = tables_of_lists(_rows(rows, cutter, _Shape.of(pair, task)), names)
    made = with_tokens(tables, rows, split="train")
    return cached_tables({"train": made}, key, cache_dir=cache_dir)["train"], key


class _Shape(NamedTuple):
    """The shape of the rows.

    room: maximum number of pieces of a row, without special tokens.
    before, after: the student's special tokens around the pieces.
    """

    room: int
    before: NDArray[np.int32]
    after: NDArray[np.int32]
    has_word_starts: bool

    @staticmethod
    def of(pair: VocabularyPair, task: TaskConfig) -> _Shape:
        before, after = (np.array(ids, dtype=np.int32) for ids in frame(pair.student))
        special = max(len(before) + len(after), sum(map(len, frame(pair.teacher))))
        return _Shape(task.row_length - special, before, after, task.whole_word_masking)


def _rows(rows: Dataset, cutter: WordCutter, shape: _Shape) -> Iterator[_Row]:
    too_long, first_word = 0, ""
    for batch in arrow_batches(rows, TEXTS_AT_ONCE):
        for words in cutter(batch.column("text").to_pylist()):
            sizes = np.maximum(words.student.lengths, words.teacher.lengths)
            fits = sizes <= shape.room
            if not fits.all():
                first_word = first_word or words.word(int(fits.argmin()))
                too_long += int((~fits).sum())
            yield from _text_rows(words.only(fits), sizes[fits], shape)
    if too_long:
        logger.warning(
            "%d word(s) of the training texts are left out, because task.max_length leaves room "
            "for %d pieces in a row and they have more; the first is %.60s",
            too_long,
            shape.room,
            first_word,
        )


def _text_rows(words: SharedWords, sizes: NDArray[np.int64], shape: _Shape) -> Iterator[_Row]:
    """Yield the columns of the rows of a text; `sizes` are the most pieces of each word."""
    student_lengths, teacher_lengths = words.student.lengths, words.teacher.lengths
    for first, last in word_windows(sizes, shape.room):
        part = slice(first, last)
        student, teacher = (
            pieces.ids[pieces.starts[first] : pieces.starts[last]]
            for pieces in (words.student, words.teacher)
        )
        lengths = student_lengths[part]
        row = (
            np.concatenate([shape.before, student, shape.after]),
            teacher,
            lengths,
            teacher_lengths[part],
            words.fixed[part],
        )
        yield (*row, _word_starts(lengths, shape)) if shape.has_word_starts else row


def word_windows(sizes: NDArray[np.int64], room: int) -> Iterator[tuple[int, int]]:
    """Cut a text into windows of whole words with about equal numbers of pieces.

    Args:
        sizes: number of pieces of each word [words], at most `room`; no words have no windows.
        room: maximum number of pieces in a window.

    Yields:
        The first word of each window, and the word after its last one.
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


def _word_starts(lengths: NDArray[np.int64], shape: _Shape) -> NDArray[np.int32]:
    """Return the position of the first token of each token's word; special tokens are words."""
    sizes = np.concatenate([np.ones_like(shape.before), lengths, np.ones_like(shape.after)])
    return np.repeat(np.cumsum(sizes) - sizes, sizes).astype(np.int32)


def _check_numbers(role: str, tokenizer: PreTrainedTokenizerBase) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= len(tokenizer):
        raise DataError(
            f"method.student_vocabulary: the tokenizer of the {role} has {len(tokenizer)} tokens, "
            f"and one of them has the number {highest}; use a tokenizer whose tokens are numbered "
            "without gaps"
        )
