"""Words of a text, as the tokenizers of mixed vocabularies cut them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megakd.data.tokenizers import VocabularyPair
from megakd.data.vocabularies import train_tokenizer
from megakd.methods.mixed_vocabulary.shared_words import WordCutter

TEXT = "the unbelievable cats, it isn't naïve"
WORDS = {
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


@pytest.mark.parametrize("kind", list(WORDS))
def test_a_word_is_what_the_tokenizer_cuts_off_before_it_looks_for_pieces(kind):
    assert "|".join(words_of(trained(kind), TEXT)) == WORDS[kind]


def test_pieces_of_a_tokenizer_without_words_are_cut_at_white_space():
    made = Tokenizer(models.BPE({c: n for n, c in enumerate("▁abcd")}, []))
    made.normalizer = normalizers.Replace(" ", "▁")

    result = words_of(PreTrainedTokenizerFast(tokenizer_object=made), "ab cad d")

    assert result == ["ab", "cad", "d"]
