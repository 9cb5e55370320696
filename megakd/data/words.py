"""Words of a text as its tokenizer cuts them, for masks of whole words.

A word is what the tokenizer's pre-tokenizer cuts off, or a part of this between two white spaces.
The second rule is for tokenizers that do not cut texts at white space before they look for pieces.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from transformers import BatchEncoding, PreTrainedTokenizerBase

from megakd.errors import DataError

WORD_STARTS = "word_starts"
"""Column of encoded rows: by token, the position in the row of the first token of its word."""


def check_words(
    tokenizer: PreTrainedTokenizerBase,
    *,
    whose: str = "task.whole_word_masking: the tokenizer",
    otherwise: str = ", or remove the key",
) -> None:
    """Raise a DataError if a tokenizer does not tell the words that tokens belong to.

    `whose` is the key that needs words, and `otherwise` what the user can do instead.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{whose} is a {type(tokenizer).__name__}, which does not tell the words that its "
            f"tokens belong to; use a fast tokenizer (a folder with a tokenizer.json){otherwise}"
        )


def word_starts(encoded: BatchEncoding, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield, for each text, the position of the first token of each token's word."""
    for text, encoding in zip(texts, encoded.encodings or (), strict=True):
        starts: list[int] = []
        word, end = None, 0
        # A token that belongs to no word, such as a special token, is a word of its own.
        for position, (index, (first, last)) in enumerate(
            zip(encoding.word_ids, encoding.offsets, strict=True)
        ):
            is_inside = index is not None and index == word
            continues = is_inside and not _has_space(text[end : first + 1])
            starts.append(starts[-1] if continues else position)
            word, end = index, max(end, last)
        yield starts


def _has_space(text: str) -> bool:
    # BERT's normalizer removes other control characters, so that their neighbours are one word.
    return any(sign in "\t\n\r" or unicodedata.category(sign).startswith("Z") for sign in text)
