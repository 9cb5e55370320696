"""Texts of files: found by their prompts and seeds, without keeping them in memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from megakd.contract.completions import Completion, Rollout, Sampling
from megakd.engine import collectives
from megakd.errors import DataError
from megakd.rollouts.generators import FileGenerator
from megakd.rollouts.store import RolloutStore, rollout_files


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 0)


def generator(folder: Path, *texts: tuple[tuple[int, ...], tuple[int, ...]]) -> FileGenerator:
    """A generator of texts, each in a file of its own."""
    store = RolloutStore(folder)
    for step, (prompt, ids) in enumerate(texts):
        store.write(step, [Rollout(0, prompt, Completion(ids, finished=True), 0, 0)])
    return FileGenerator(rollout_files(folder))


def test_the_seed_chooses_among_the_texts_of_a_prompt_in_the_order_of_the_files(tmp_path: Path):
    made = generator(tmp_path, ((1, 2), (3,)), ((1,), (7, 8, 9)), ((1, 2), (4,)), ((1, 2), (5,)))

    found = made.generate([(1, 2)] * 4 + [(1,)], [0, 1, 5, 3, 11], Sampling(2))

    assert [text.ids for text in found] == [(3,), (4,), (5,), (3,), (7, 8)]
    assert [text.finished for text in found] == [True] * 4 + [False]


def test_a_prompt_without_a_text_is_refused(tmp_path: Path):
    made = generator(tmp_path, ((1, 2), (3,)), ((1,), (4,)))

    with pytest.raises(DataError, match=r"the 2 prompts in the files .* prompt of 3 tokens"):
        made.generate([(1, 2, 3)], [0], Sampling(2))


def test_memory_does_not_grow_with_the_lengths_of_the_texts(tmp_path: Path):
    texts = [((n,), tuple(range(1000, 6000))) for n in range(20)]
    generator(tmp_path, *texts)
    tracemalloc.start()

    made = FileGenerator(rollout_files(tmp_path))

    assert tracemalloc.get_traced_memory()[0] < 20_000  # 0.2 bytes a token
    tracemalloc.stop()
    assert made.generate([(3,)], [0], Sampling(9))[0].ids == tuple(range(1000, 1009))
