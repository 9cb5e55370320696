"""Evaluation on generated texts: metrics, compared answers, and end tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from checkpoint_store import ALONE
from datasets import Dataset
from transformers import GenerationConfig as HuggingFaceGeneration
from transformers import LlamaConfig

from megakd.config.sections import GenerationConfig, Sampling, SamplingConfig
from megakd.data.batch import IGNORE
from megakd.errors import DataError
from megakd.models.end_tokens import end_tokens_of
from megakd.models.generation import Completion
from megakd.teachers import rollouts
from megakd.teachers.rollouts import Prompts
from megakd.teachers.scored_texts import TextEvaluation, is_match

LETTERS = " abcdefgh"


class Letters:
    """A tokenizer of letters; 0 is a special token."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(LETTERS[token] for token in ids if token or not skip_special_tokens)


class Echo:
    """A generator that repeats a prompt, and ends every second text."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[tuple[int, ...]], list[int], Sampling]] = []

    def update(self, version: int) -> None: ...

    def begin(self, prompts: Any, seeds: Any, sampling: Sampling) -> Any:
        self.asked.append((list(prompts), list(seeds), sampling))
        pairs = list(enumerate(prompts))
        return lambda: [Completion((*p, 0), finished=number % 2 == 0) for number, p in pairs]


@pytest.fixture
def rows() -> Dataset:
    """Three rows: a prompt of two letters, and a completion of two letters."""
    ids = [[1, 2, 1, 2], [3, 4, 3, 3], [5, 6, 5, 6]]
    labels = [[IGNORE, *row[2:], IGNORE] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "prompt_length": [2, 2, 2]})


def evaluation(data: Dataset, folder: Path, **keys: Any) -> tuple[Any, Echo]:
    generator, tokenizer = Echo(), cast("Any", Letters())
    prompts = Prompts(data, prompt_tokens=None, most=12, row_length=keys.pop("row_length", None))
    config = GenerationConfig(**{"max_new_tokens": 4, **keys})
    places: Any = {"generator": generator, "ranks": ALONE, "folder": folder}
    return TextEvaluation(config, prompts, tokenizer, **places), generator


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "gather", lambda value: [value])
    monkeypatch.setattr(rollouts, "on_main", lambda action: action())


def test_texts_are_scored_against_the_completions_and_written(rows, tmp_path):
    made, _ = evaluation(rows, tmp_path, match="exact")

    scores = made.scores(version=7)

    assert scores["match"] == pytest.approx(2 / 3)  # the second row's completion is not its prompt
    assert scores["text_tokens"] == 3
    assert scores["text_truncated"] == pytest.approx(1 / 3)
    lines = (tmp_path / "step-00000007.jsonl").read_text().splitlines()
    first, second, _ = map(json.loads, lines)
    texts = dict.fromkeys(("prompt", "text", "wanted"), "ab")
    assert first == {**texts, "finished": True, "matches": True, "tokens": 3}
    assert (second["text"], second["wanted"], second["matches"]) == ("cd", "cc", False)


@pytest.mark.parametrize(
    ("ids", "labels", "keys", "expected"),
    [
        # An answer ends before the next turn, and a prompt alone is not compared.
        (
            [[1, 2, 1, 2, 7, 8], [3, 4, 3, 3, 0, 0], [5, 6]],
            [[-100, 1, 2, -100, 8, -100], [-100, 3, 3, -100, -100, -100], [-100, -100]],
            {},
            {"ab": True, "cc": False, "": None},
        ),
        # A row that may be cut before its answer is not compared.
        (
            [[1, 2, 1, 2], [3, 4, 3, 3, 5]],
            [[-100, 1, 2, -100], [-100, 3, 3, 5, -100]],
            {"row_length": 5},
            {"ab": True, "cce": None},
        ),
    ],
)
def test_only_whole_first_answers_are_compared(tmp_path, ids, labels, keys, expected):
    columns = {"input_ids": ids, "labels": labels, "prompt_length": [2] * len(ids)}
    made, _ = evaluation(Dataset.from_dict(columns), tmp_path, match="exact", **keys)

    scores = made.scores(version=1)

    lines = map(json.loads, (tmp_path / "step-00000001.jsonl").read_text().splitlines())
    assert {line["wanted"]: line["matches"] for line in lines} == expected
    assert scores["match"] == (0.5 if False in expected.values() else 1)


def test_every_evaluation_asks_for_the_same_prompts_with_the_same_seeds(rows, tmp_path):
    keys = {"sampling": SamplingConfig(temperature=0.5), "rows": 2}
    made, generator = evaluation(rows, tmp_path, **keys)

    made.texts()
    assert {text["matches"] for text in made.texts()} == {None}

    first, second = generator.asked
    assert first == second
    assert first[0] == [(1, 2), (3, 4)]
    assert first[2] == Sampling(4, temperature=0.5)


GSM8K = r"#### (.+)"


@pytest.mark.parametrize(
    ("text", "other", "pattern", "same"),
    [
        ("so\n#### 72", "Natalia sold 48.\n#### 72", GSM8K, True),
        ("so\n#### 73", "Natalia sold 48.\n#### 72", GSM8K, False),
        ("72", "72", GSM8K, False),
        ("#### 3\nno, #### 4 \n", "#### 4", GSM8K, True),  # the last one
        ("72 ", "72", None, True),
    ],
)
def test_texts_are_compared_by_their_answers_and_match_nothing_without_one(
    text, other, pattern, same
):
    assert is_match(text, other, pattern) == same


class Tokens:
    """Knows its end token and the tokens that were added to its vocabulary."""

    def __init__(self, eos_token_id: int | None, *added: int) -> None:
        self.eos_token_id = eos_token_id
        self.added_tokens_decoder = dict.fromkeys(added)


@pytest.mark.parametrize(
    ("tokenizer", "in_config", "in_generation", "expected"),
    [
        (Tokens(0), 0, None, {0}),
        (Tokens(9), [7, 8, 9], None, {7, 8, 9}),
        (Tokens(9), 9, [9, 5], {5, 9}),
        (Tokens(None), 3, [4], {3, 4}),
        # Qwen3-Base: the tokenizer ends with <|im_end|>, and the model with <|endoftext|>. A token
        # that was added to the vocabulary ends texts.
        (Tokens(7, 5, 6, 7), 5, 5, {5, 7}),
        (Tokens(7, 6, 7), 5, 5, {7}),
        (Tokens(7), 2, None, {7}),  # the default of Llama
    ],
)
def test_texts_end_at_the_tokens_of_the_tokenizer_and_of_the_configs(
    tokenizer, in_config, in_generation, expected
):
    generation = in_generation and HuggingFaceGeneration(eos_token_id=in_generation)
    assert end_tokens_of(tokenizer, LlamaConfig(eos_token_id=in_config), generation) == expected


def test_a_tokenizer_and_configs_without_an_end_token_are_refused():
    with pytest.raises(DataError, match="no eos_token"):
        end_tokens_of(Tokens(None), LlamaConfig(eos_token_id=None), HuggingFaceGeneration())
