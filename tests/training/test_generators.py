"""Generators of texts: files, end tokens, and statistics of what they make."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig

from megakd.contract.completions import Completion, Rollout, Sampling
from megakd.errors import DataError
from megakd.rollouts.batches import RolloutStatistics
from megakd.rollouts.generators import FileGenerator, end_tokens_of
from megakd.rollouts.store import RolloutStore, rollout_files


def generator(folder: Path, *texts: tuple[tuple[int, ...], tuple[int, ...]]) -> FileGenerator:
    """A generator of texts, each in a file of its own."""
    store = RolloutStore(folder)
    for step, (prompt, ids) in enumerate(texts):
        store.write(step, [Rollout(0, prompt, Completion(ids, finished=True), 0, 0)])
    return FileGenerator(rollout_files(folder))


def test_the_seed_chooses_among_the_texts_of_a_prompt_in_the_order_of_the_files(tmp_path: Path):
    made = generator(tmp_path, ((1, 2), (3,)), ((1,), (7, 8, 9)), ((1, 2), (4,)), ((1, 2), (5,)))

    with pytest.raises(DataError, match=r"the 2 prompts in the files .* prompt of 3 tokens"):
        made.generate([(1, 2, 3)], [0], Sampling(2))
    result = made.generate([(1, 2)] * 4 + [(1,)], [0, 1, 5, 3, 11], Sampling(2))

    assert [text.ids for text in result] == [(3,), (4,), (5,), (3,), (7, 8)]
    assert [text.finished for text in result] == [True] * 4 + [False]


def test_memory_does_not_grow_with_the_lengths_of_the_texts(tmp_path: Path):
    texts = [((n,), tuple(range(1000, 6000))) for n in range(20)]
    generator(tmp_path, *texts)
    tracemalloc.start()

    made = FileGenerator(rollout_files(tmp_path))

    assert tracemalloc.get_traced_memory()[0] < 20_000  # 0.2 bytes a token
    tracemalloc.stop()
    assert made.generate([(3,)], [0], Sampling(9))[0].ids == tuple(range(1000, 1009))


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


def text(*ids: int, finished: bool = True, version: int = 5) -> Rollout:
    return Rollout(0, (9,), Completion(ids, finished), version, seed=0)


@pytest.mark.parametrize("times", [1, 10])
def test_statistics_are_means_over_the_texts_each_of_which_counts_its_own_pairs(times: int) -> None:
    result = RolloutStatistics()
    assert result.scalars() == {}

    result.add([text(1, 2, 3, version=4), text(1, 1, 1, finished=False)] * times, 6)

    values = {"tokens_per_text": 3, "truncated": 0.5, "staleness": 1.5, "distinct_2": (1 + 0.5) / 2}
    wanted = {f"rollout/{name}": pytest.approx(value) for name, value in values.items()}
    assert {**result.scalars(), **wanted} == result.scalars()
