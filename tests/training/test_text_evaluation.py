"""Evaluation on generated texts: the texts, their metrics, and the batches of their losses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from megakd.config.rollout import GenerationConfig, SamplingConfig
from megakd.contract.batch import IGNORE
from megakd.contract.completions import Completion, Sampling
from megakd.rollouts.prompts import Prompts
from megakd.rollouts.text_evaluation import TextEvaluation, distinct_pairs

LETTERS = " abcdefgh"


class Letters:
    """A tokenizer of letters; 0 is a special token."""

    pad_token_id = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(LETTERS[token] for token in ids if token or not skip_special_tokens)


class Echo:
    """A generator that repeats a prompt, and ends every second text."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[tuple[int, ...]], list[int], Sampling]] = []

    def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> list[Completion]:
        self.asked.append((list(prompts), list(seeds), sampling))
        return [Completion((*p, 0), finished=number % 2 == 0) for number, p in enumerate(prompts)]


@pytest.fixture
def rows() -> Dataset:
    """Three rows: a prompt of two letters, and a completion of two letters."""
    ids = [[1, 2, 1, 2], [3, 4, 3, 3], [5, 6, 5, 6]]
    labels = [[IGNORE, *row[2:], IGNORE] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "prompt_length": [2, 2, 2]})


def evaluation(data: Dataset, folder: Path, one_rank: Any, **keys: Any) -> tuple[Any, Echo]:
    from megakd.config.task import TaskConfig
    from megakd.data.collation import Collator

    task = TaskConfig(type="causal_lm", dataset="x", max_length=16)
    scorer = SimpleNamespace(
        ranks=one_rank,
        collate=Collator(Letters(), task),
        batch_size=2,  # type: ignore[arg-type]
    )
    generator = Echo()
    config = GenerationConfig(**{"max_new_tokens": 4, **keys})
    made = TextEvaluation(
        config,
        Prompts(data, prompt_tokens=None, most=12),
        Letters(),
        generator=generator,
        scorer=scorer,
        folder=folder,  # type: ignore[arg-type]
    )
    return made, generator


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    import torch

    monkeypatch.setattr("megakd.rollouts.text_evaluation.gather", lambda value: [value])
    monkeypatch.setattr("megakd.rollouts.text_evaluation.on_main", lambda action: action())
    monkeypatch.setattr("megakd.rollouts.text_evaluation.all_reduce_", lambda tensor: tensor)
    return SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))


def test_texts_are_scored_against_the_completions_of_the_rows(rows, tmp_path, one_rank):
    made, _ = evaluation(rows, tmp_path, one_rank, match="exact")

    scores = made.scores(version=7, losses=None)

    assert scores["match"] == pytest.approx(2 / 3)  # the second row's completion is not its prompt
    assert scores["text_tokens"] == 3
    assert scores["text_truncated"] == pytest.approx(1 / 3)


def test_the_texts_of_an_evaluation_are_written_with_what_was_wanted(rows, tmp_path, one_rank):
    made, _ = evaluation(rows, tmp_path, one_rank, match="exact", rows=2)

    made.scores(version=7, losses=None)

    lines = (tmp_path / "step-00000007.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first == {
        "prompt": "ab", "text": "ab", "wanted": "ab", "finished": True, "matches": True
    }  # fmt: skip
    assert (second["text"], second["wanted"], second["matches"]) == ("cd", "cc", False)


def test_every_evaluation_asks_for_the_same_prompts_with_the_same_seeds(rows, tmp_path, one_rank):
    made, generator = evaluation(
        rows, tmp_path, one_rank, sampling=SamplingConfig(temperature=0.5), rows=2
    )

    made.texts(0)
    made.texts(9)

    first, second = generator.asked
    assert first == second
    assert first[0] == [(1, 2), (3, 4)]
    assert first[2] == Sampling(4, temperature=0.5)


def test_losses_see_every_generated_token_once_and_no_token_of_the_data(rows, tmp_path, one_rank):
    made, _ = evaluation(rows, tmp_path, one_rank)
    seen: list[int] = []

    def losses(batches: Any, watch: Any) -> dict[str, float]:
        for batch in batches:
            assert batch.extras.is_rollout[batch.valid].all()
            seen.extend(batch.labels[batch.labels != IGNORE].tolist())
        return {"soft_target_kl": 0.5}

    scores = made.scores(version=0, losses=losses)

    assert scores["text_soft_target_kl"] == 0.5
    assert sorted(seen) == sorted([1, 2, 0, 3, 4, 0, 5, 6, 0])


@pytest.mark.parametrize(
    ("texts", "share"),
    [([], 1.0), ([(1,)], 1.0), ([(1, 2, 3)], 1.0), ([(1, 1, 1)], 0.5), ([(1, 2), (1, 2)], 0.5)],
)
def test_repeated_pairs_lower_the_share_of_distinct_pairs(texts, share):
    assert distinct_pairs([Completion(ids, finished=True) for ids in texts]) == share
