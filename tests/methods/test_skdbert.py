"""Draws of teachers: their probabilities, and that they follow from seed and step."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.methods.skdbert import Drawn, SkdbertConfig, probabilities_of, ranks

NAMES = ("small", "middle", "large")


def names(*probabilities: float, steps: Any, seed: int = 3) -> list[str | None]:
    strategy = Drawn(NAMES, probabilities, seed)
    return [planned.teacher for step in steps for planned in strategy.passes(step)]


@pytest.mark.parametrize(
    ("scores", "parts"),
    [((0.1, 0.5, 0.3, 0.9, 0.7), (1, 3, 2, 5, 4)), ((0.5, 0.5, 0.5), (1, 1, 1))],
    ids=["five ranks", "equal scores"],
)
def test_ranks_weigh_as_one_to_five_and_are_uniform_if_nothing_tells_them_apart(scores, parts):
    config = SkdbertConfig(name="skdbert", distribution="teacher_rank")
    known = dict(zip("abcde", scores, strict=False))
    record = SimpleNamespace(dev_scores=dict[str, float]())
    lab: Any = SimpleNamespace(dev_score=known.__getitem__, record=record)

    result = probabilities_of(config, lab, tuple(known))

    assert list(result.values()) == pytest.approx([part / sum(parts) for part in parts])


@given(st.lists(st.floats(-10, 10, allow_nan=False), min_size=1, max_size=8))
def test_ranks_add_up_whatever_is_tied(scores):
    result = ranks(scores)

    assert sum(result) == pytest.approx(len(scores) * (len(scores) + 1) / 2)
    for one, rank in zip(scores, result, strict=True):
        for other, its_rank in zip(scores, result, strict=True):
            assert (one < other) == (rank < its_rank)


@pytest.mark.parametrize("probabilities", [(0.1, 0.3, 0.6), (0.5, 0.0, 0.5)])
def test_teachers_are_drawn_as_often_as_they_are_likely(probabilities):
    steps = 20_000

    counts = Counter(names(*probabilities, steps=range(steps)))

    for name, probability in zip(NAMES, probabilities, strict=True):
        sigma = math.sqrt(steps * probability * (1 - probability))
        assert abs(counts[name] - steps * probability) <= 4 * sigma


def test_a_draw_depends_on_seed_and_step_alone():
    in_order = names(0.2, 0.3, 0.5, steps=range(60))

    assert in_order == names(0.2, 0.3, 0.5, steps=reversed(range(60)))[::-1]
    assert in_order != names(0.2, 0.3, 0.5, steps=range(60), seed=4)
