"""The end tokens of generated texts."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig

from megakd.errors import DataError
from megakd.models.generation import end_tokens_of


class Tokenizer:
    """Knows its end token and the tokens that were added to its vocabulary."""

    def __init__(self, eos_token_id: int | None, *added: int) -> None:
        self.eos_token_id = eos_token_id
        self.added_tokens_decoder = dict.fromkeys(added)


FIVE = [LlamaConfig(eos_token_id=5), GenerationConfig(eos_token_id=5)]


@pytest.mark.parametrize(
    ("tokenizer", "configs", "expected"),
    [
        (Tokenizer(7), [PretrainedConfig(eos_token_id=7), None], {7}),
        (Tokenizer(9), [LlamaConfig(eos_token_id=[7, 8, 9])], {7, 8, 9}),
        (
            Tokenizer(9),
            [LlamaConfig(eos_token_id=9), GenerationConfig(eos_token_id=[9, 5])],
            {5, 9},
        ),
        (
            Tokenizer(None),
            [LlamaConfig(eos_token_id=3), GenerationConfig(eos_token_id=[4])],
            {3, 4},
        ),
        (Tokenizer(0), [PretrainedConfig(eos_token_id=0)], {0}),
        # Qwen3-Base: the tokenizer ends with <|im_end|>, and the model with <|endoftext|>. A token
        # that was added to the vocabulary ends texts.
        (Tokenizer(7, 5, 6, 7), FIVE, {5, 7}),
        (Tokenizer(7, 6, 7), FIVE, {7}),
        (Tokenizer(7), [LlamaConfig()], {7}),  # whose default is 2
    ],
)
def test_end_tokens_are_those_of_the_tokenizer_and_of_the_configs(tokenizer, configs, expected):
    assert end_tokens_of(tokenizer, *configs) == expected


def test_a_tokenizer_and_configs_without_an_end_token_are_refused():
    with pytest.raises(DataError, match="no eos_token"):
        end_tokens_of(Tokenizer(None), LlamaConfig(eos_token_id=None), GenerationConfig())
