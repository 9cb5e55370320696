"""Numbers of characters that tokens stand for, to compare language models across vocabularies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import decoders, models

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""SentencePiece's mark of a space."""


def characters_of_tokens(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the number of characters of every token, without white space.

    A special token has none. A token of bytes counts the characters that begin in the token.

    Args:
        tokenizer: any tokenizer.

    Returns:
        [V] int64, where V is the largest token number plus 1.
    """
    tokens = tokenizer.get_vocab()
    counts = torch.zeros(max(tokens.values()) + 1, dtype=torch.long)
    special, count = set(tokenizer.all_special_ids), _counter(tokenizer)
    for token, number in tokens.items():
        counts[number] = 0 if number in special else count(token)
    return counts


def _counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], int]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.model, models.WordPiece):
        prefix: str = backend.model.continuing_subword_prefix
        return lambda token: len(token.removeprefix(prefix))
    if backend is not None and isinstance(backend.decoder, decoders.ByteLevel):
        return _begun_characters
    return lambda token: len(token.replace(_SPACE, ""))


def _begun_characters(token: str) -> int:
    """Return the number of characters, except spaces, whose first byte is in a token of bytes."""
    return sum(sign not in _NO_CHARACTER for sign in token)


def _signs_without_character() -> frozenset[str]:
    """Return the signs of a byte-level vocabulary for white space and for later bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in plain]
    signs = {byte: chr(byte) for byte in plain}
    # GPT-2 shows the other bytes, in their order, as the characters from 256 on.
    signs |= {byte: chr(256 + number) for number, byte in enumerate(moved)}
    left_out = [byte for byte in range(256) if 128 <= byte < 192 or bytes([byte]).isspace()]
    return frozenset(signs[byte] for byte in left_out)


_NO_CHARACTER = _signs_without_character()
