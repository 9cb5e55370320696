"""The end tokens of a model; tests/distributed generates with engines."""

from __future__ import annotations

import pytest
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig

from megakd.errors import DataError
from megakd.rollouts.generators import end_tokens_of


class Tokenizer:
    """Knows its end token and the tokens that were added to its vocabulary."""

    def __init__(self, eos_token_id: int | None, *added: int) -> None:
        self.eos_token_id = eos_token_id
        self.added_tokens_decoder = dict.fromkeys(added)


@pytest.mark.parametrize(
    ("tokenizer", "configs", "expected"),
    [
        (7, [PretrainedConfig()], {7}),
        (7, [PretrainedConfig(eos_token_id=7), None], {7}),
        (9, [LlamaConfig(eos_token_id=[7, 8, 9])], {7, 8, 9}),
        (9, [LlamaConfig(eos_token_id=9), GenerationConfig(eos_token_id=[9, 5])], {5, 9}),
        (None, [LlamaConfig(eos_token_id=3)], {3}),
        (None, [LlamaConfig(eos_token_id=3), GenerationConfig(eos_token_id=[4])], {3, 4}),
        (0, [PretrainedConfig(eos_token_id=0)], {0}),
    ],
)
def test_end_tokens_are_those_of_the_tokenizer_and_of_the_configs(tokenizer, configs, expected):
    assert end_tokens_of(Tokenizer(tokenizer), *configs) == expected


def test_an_added_token_in_the_generation_config_ends_texts_of_another_end_token():
    """Qwen3-Base: the tokenizer ends with <|im_end|>, and the model with <|endoftext|>."""
    config, generation = LlamaConfig(eos_token_id=5), GenerationConfig(eos_token_id=5)

    assert end_tokens_of(Tokenizer(7, 5, 6, 7), config, generation) == {5, 7}
    assert end_tokens_of(Tokenizer(7, 6, 7), config, generation) == {7}


def test_the_default_of_a_config_does_not_end_texts_of_another_tokenizer():
    default = LlamaConfig()
    assert default.eos_token_id == 2

    assert end_tokens_of(Tokenizer(7), default) == {7}


def test_a_tokenizer_and_configs_without_an_end_token_are_refused():
    with pytest.raises(DataError, match="no eos_token"):
        end_tokens_of(Tokenizer(None), LlamaConfig(eos_token_id=None), GenerationConfig())
