"""Draws of teachers: their probabilities, and their mean effect on the student."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.contract.stage import Stage, StageResult
from megakd.methods.skdbert import Drawn, SkdbertConfig, probabilities_of, ranks, run

NAMES = ("small", "middle", "large")
Finite = st.floats(-10, 10, allow_nan=False)


def scored(scores: dict[str, float]) -> Any:
    """A lab whose scores are known."""
    return SimpleNamespace(
        dev_score=scores.__getitem__, record=SimpleNamespace(dev_scores=dict[str, float]())
    )


def drawn(*probabilities: float, seed: int = 3) -> Drawn:
    return Drawn(NAMES[: len(probabilities)], probabilities, seed)


def names(strategy: Drawn, steps: int) -> list[str | None]:
    return [planned.teacher for step in range(steps) for planned in strategy.passes(step)]


@pytest.mark.parametrize(
    ("scores", "parts"),
    [((0.1, 0.5, 0.3, 0.9, 0.7), (1, 3, 2, 5, 4)), ((0.5, 0.5, 0.5), (1, 1, 1))],
    ids=["five ranks", "equal scores"],
)
def test_ranks_weigh_as_one_to_five_and_are_uniform_if_nothing_tells_them_apart(scores, parts):
    config = SkdbertConfig(name="skdbert", distribution="teacher_rank")
    known = dict(zip("abcde", scores, strict=False))

    result = probabilities_of(config, scored(known), tuple(known))

    assert list(result.values()) == pytest.approx([part / sum(parts) for part in parts])


@given(st.lists(Finite, min_size=1, max_size=8))
def test_ranks_add_up_whatever_is_tied(scores):
    result = ranks(scores)

    assert sum(result) == pytest.approx(len(scores) * (len(scores) + 1) / 2)
    for one, rank in zip(scores, result, strict=True):
        for other, its_rank in zip(scores, result, strict=True):
            assert (one < other) == (rank < its_rank)


def test_weights_need_not_sum_to_one_and_a_teacher_of_weight_zero_is_never_prepared():
    weights = {"small": 1.0, "middle": 0.0, "large": 3.0}
    config = SkdbertConfig(name="skdbert", distribution="weights", weights=weights)
    lab: Any = Preparing()

    run(config, lab)

    assert probabilities_of(config, scored({}), NAMES) == {
        "small": 0.25,
        "middle": 0,
        "large": 0.75,
    }
    (stage,) = lab.trained
    assert lab.prepared == ["small", "large"]
    assert stage.teachers == ("small", "large")
    told = {one["name"]: (one["weight"], one["steps"]) for one in lab.record.pool["teachers"]}
    assert list(told) == list(NAMES)
    assert told["middle"] == (0.0, 0)
    assert told["small"][1] + told["large"][1] == 10


class Preparing:
    """A lab that notes which teachers are prepared, and trains nothing."""

    def __init__(self) -> None:
        specs = dict.fromkeys(NAMES)
        self.config = SimpleNamespace(teacher_specs=specs, objective=("a term",), seed=1)
        self.record = SimpleNamespace(dev_scores={}, pool=None)
        self.prepared: list[str] = []
        self.trained: list[Stage] = []

    def teacher(self, name: str) -> str:
        self.prepared.append(name)
        return name

    def train(self, stage: Stage) -> StageResult:
        self.trained.append(stage)
        return StageResult(name=stage.name, folder=Path(stage.name), steps=10)


@pytest.mark.parametrize("probabilities", [(0.1, 0.3, 0.6), (0.5, 0.0, 0.5)])
def test_teachers_are_drawn_as_often_as_they_are_likely(probabilities):
    steps = 20_000

    counts = Counter(names(drawn(*probabilities), steps))

    for name, probability in zip(NAMES, probabilities, strict=True):
        sigma = math.sqrt(steps * probability * (1 - probability))
        assert abs(counts[name] - steps * probability) <= 4 * sigma


def test_a_draw_depends_on_seed_and_step_alone():
    one, other = drawn(0.2, 0.3, 0.5), drawn(0.2, 0.3, 0.5)

    in_order = names(one, 60)
    backwards = [other.passes(step)[0].teacher for step in reversed(range(60))]

    assert in_order == backwards[::-1]
    assert in_order != names(drawn(0.2, 0.3, 0.5, seed=4), 60)
