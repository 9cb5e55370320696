"""The student's own vocabulary, and words of texts in two vocabularies, word by word.

A word is what a tokenizer cuts off before it looks for pieces. Both vocabularies must cut a text
into the same words, and the pieces of a word must spell the same word in both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from megakd.data.arrow import key_of, rows_key
from megakd.data.splits import Splits
from megakd.data.token_tables import plain_encoding
from megakd.data.tokenizers import VERSION as TRAINER_VERSION
from megakd.data.tokenizers import VocabularyPair, from_folder, train_tokenizer, training_texts
from megakd.errors import DataError
from megakd.process.seals import whole_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# Part of every key: increase this number when the trained vocabularies would differ.
VERSION = 1

SIZE_KEY = "method.student_vocabulary"

ROLES = ("pad", "unk", "cls", "sep", "mask")


def load_student_tokenizer(
    pieces: int, splits: Splits, *, cache_dir: Path
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a student, with exactly `pieces` tokens.

    The tokenizer is lower-cased, has BERT's template ([CLS] text [SEP]) and BERT's special tokens,
    and is trained once per training text.
    """
    key = key_of(
        {
            "version": (VERSION, TRAINER_VERSION),
            "rows": rows_key(splits.train),
            "type": "wordpiece",
            "student_size": pieces,
        }
    )

    def build(folder: Path) -> None:
        _trained(pieces, lambda: training_texts(splits)).save_pretrained(folder)

    folder = whole_folder(cache_dir / "tokenizers" / key, build)
    return from_folder(folder)


def _trained(size: int, texts: Callable[[], Iterable[str]]) -> PreTrainedTokenizerBase:
    tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=size, for_encoder=True)
    count = len(tokenizer)
    if count > size:
        raise DataError(
            f"the special tokens and the characters of the training text take {count} pieces, and "
            f"{SIZE_KEY} is {size}; set {SIZE_KEY} to at least {count}"
        )
    if count < size:
        raise DataError(
            f"the training text gives only {count} pieces that occur at least twice, special "
            f"tokens included, and {SIZE_KEY} is {size}; lower {SIZE_KEY}, or give more text"
        )
    return tokenizer


def check_special_tokens(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Check that pad, unk, cls, sep and mask differ, and that cls and sep are around every text.

    An error message begins with `where`: a config key, a folder or a name.
    """
    vocabulary, roles = tokenizer.get_vocab(), dict[int, str]()
    for role in ROLES:
        token = getattr(tokenizer, f"{role}_token")
        number = vocabulary.get(str(token))
        if number is None:
            raise DataError(
                f"{where}: the tokenizer has no {role} token ({token}); set {role}_token in its "
                "tokenizer_config.json to a token of the vocabulary, or use another tokenizer"
            )
        if number in roles:
            raise DataError(
                f"{where}: {token} is both the {roles[number]} token and the {role} token of the "
                f"tokenizer; set {role}_token in its tokenizer_config.json to a token of its own"
            )
        roles[number] = role
    ids: Any = tokenizer("a")["input_ids"]
    first, last = tokenizer.convert_ids_to_tokens([ids[0], ids[-1]])
    if [roles.get(ids[0]), roles.get(ids[-1])] != ["cls", "sep"]:
        raise DataError(
            f"{where}: an encoded text begins with {first} and ends with {last}, and the "
            f"tokenizer's cls token is {tokenizer.cls_token} and its sep token "
            f"{tokenizer.sep_token}; set both in its tokenizer_config.json to the tokens that "
            "start and end a text"
        )


FREE, ALWAYS_STUDENT, ALWAYS_TEACHER = range(3)
"""Values of `SharedWords.fixed`."""

_DIFFERENT = -1

KNOWN_WORDS = 1 << 18
"""Number of words whose spelling is remembered."""

_SHOWN = 3  # words in a message

_ADVICE = (
    "use a WordPiece teacher such as BERT, and a WordPiece student vocabulary with the teacher's "
    "normalizer and pre-tokenizer"
)


class WordPieces(NamedTuple):
    """The pieces of a text in one vocabulary, without special tokens.

    ids: [pieces] int32.
    starts: [words + 1] int64 positions in `ids` of the first piece of each word, and the number of
        pieces.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of pieces of each word [words], at least 1."""
        return np.diff(self.starts)

    def only(self, kept: NDArray[np.bool_]) -> WordPieces:
        """Return the words that a mask [words] keeps."""
        lengths = self.lengths
        starts = np.concatenate([[0], np.cumsum(lengths[kept])])
        return WordPieces(self.ids[np.repeat(kept, lengths)], starts)


class SharedWords(NamedTuple):
    """The words of a text in both vocabularies.

    spans: [words, 2] int64 first character of each word, and the character after its last one.
    fixed: [words] int32 `FREE`, or the vocabulary that always cuts the word, because the other does
        not know the word. The teacher's [UNK] stands for words that both do not know.
    """

    text: str
    spans: NDArray[np.int64]
    student: WordPieces
    teacher: WordPieces
    fixed: NDArray[np.int32]

    def word(self, number: int) -> str:
        first, last = self.spans[number]
        return self.text[first:last]

    def only(self, kept: NDArray[np.bool_]) -> SharedWords:
        return SharedWords(
            self.text,
            self.spans[kept],
            self.student.only(kept),
            self.teacher.only(kept),
            self.fixed[kept],
        )


class WordCutter:
    """A function that cuts texts into words in both vocabularies."""

    def __init__(self, pair: VocabularyPair) -> None:
        for role, tokenizer in zip(pair._fields, pair, strict=True):
            if not tokenizer.is_fast:
                raise DataError(
                    f"method.student_vocabulary: the tokenizer of the {role} is a "
                    f"{type(tokenizer).__name__}, which does not tell the words that its tokens "
                    "belong to; use a fast tokenizer (a folder with a tokenizer.json)"
                )
        self._pair = pair
        self._student, self._teacher = map(_Spelling, pair)
        # Most words of a text occur many times.
        self._known = functools.lru_cache(KNOWN_WORDS)(self._fixed)

    def __call__(self, texts: Sequence[str]) -> Iterator[SharedWords]:
        """Yield the words of each text; both vocabularies must cut and spell them alike."""
        ours, theirs = (_words(plain_encoding(texts, part)) for part in self._pair)
        for text, (student, spans), (teacher, others) in zip(texts, ours, theirs, strict=True):
            if not np.array_equal(spans, others):
                raise _different_words(text, spans, others)
            cut = zip(_tuples(student), _tuples(teacher), strict=True)
            fixed = np.array([self._known(*pieces) for pieces in cut], dtype=np.int32)
            words = SharedWords(text, spans, student, teacher, fixed)
            if (fixed == _DIFFERENT).any():
                raise self._different_spelling(words, int((fixed == _DIFFERENT).argmax()))
            yield words

    def _fixed(self, student: tuple[int, ...], teacher: tuple[int, ...]) -> int:
        if not self._student.special.isdisjoint(student):
            return ALWAYS_TEACHER
        if not self._teacher.special.isdisjoint(teacher):
            return ALWAYS_STUDENT
        return FREE if self._student(student) == self._teacher(teacher) else _DIFFERENT

    def _different_spelling(self, words: SharedWords, number: int) -> DataError:
        ours, theirs = ([*_tuples(part)][number] for part in (words.student, words.teacher))
        return DataError(
            "method.student_vocabulary: the two vocabularies spell a word differently, and mixed "
            f'segmentation replaces a word by the same word: the pieces of "{words.word(number)}" '
            f'join to "{self._student(ours)}" for the student and to "{self._teacher(theirs)}" for '
            f"the teacher; {_ADVICE}"
        )


class _Spelling:
    """A function that joins the pieces of a word; `special` are the special tokens and [UNK]."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        model = cast("Any", tokenizer).backend_tokenizer.model  # of fast tokenizers only
        prefix = getattr(model, "continuing_subword_prefix", None) or ""
        self.special = frozenset(int(number) for number in tokenizer.all_special_ids)
        self._first = {number: piece for piece, number in vocabulary.items()}
        self._inside = {n: piece.removeprefix(prefix) for n, piece in self._first.items()}

    def __call__(self, pieces: tuple[int, ...]) -> str:
        return self._first[pieces[0]] + "".join(self._inside[number] for number in pieces[1:])


def _words(encoded: BatchEncoding) -> Iterator[tuple[WordPieces, NDArray[np.int64]]]:
    """Yield the pieces of each text, and the spans [words, 2] of its words."""
    for encoding in encoded.encodings or ():
        count = len(encoding.ids)
        # A piece that belongs to no word, such as an added token, is a word of its own.
        words = [-2 - n if word is None else word for n, word in enumerate(encoding.word_ids)]
        firsts = np.flatnonzero(np.diff(words, prepend=-1))
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        begins = np.minimum.reduceat(offsets[:, 0], firsts) if count else firsts
        ends = np.maximum.reduceat(offsets[:, 1], firsts) if count else firsts
        pieces = WordPieces(np.array(encoding.ids, dtype=np.int32), np.append(firsts, count))
        yield pieces, np.stack([begins, ends], axis=1)


def _tuples(pieces: WordPieces) -> Iterator[tuple[int, ...]]:
    ids, starts = pieces.ids.tolist(), pieces.starts.tolist()
    return (tuple(ids[a:b]) for a, b in pairwise(starts))


def _different_words(
    text: str, student: NDArray[np.int64], teacher: NDArray[np.int64]
) -> DataError:
    pairs = zip_longest(student.tolist(), teacher.tolist())
    first = next(number for number, (ours, theirs) in enumerate(pairs) if ours != theirs)
    ours, theirs = (
        " | ".join(text[begin:end] for begin, end in spans[first : first + _SHOWN].tolist())
        for spans in (student, teacher)
    )
    return DataError(
        "method.student_vocabulary: the two vocabularies cut the text into different words, and "
        f"mixed segmentation replaces word by word: word {first + 1} and those after it are "
        f'"{ours}" for the student and "{theirs}" for the teacher; {_ADVICE}'
    )
