"""Warnings about texts that run away, on made-up series."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.scoring.watches import KINDS, LONGER, MORE_TRUNCATED, TextPoint, text_warnings
from megakd.training.progress import Extent, Reporter

CALM, AWAY = TextPoint(100, 0.1, 2.0), TextPoint(300, 0.9, 0.4)


def values(point: TextPoint, kind: str = "evaluation") -> dict[str, float]:
    return dict(zip(KINDS[kind][:3], point, strict=True))


def series(
    *points: TextPoint, kind: str = "evaluation", stage: str = "student"
) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "step": 10 * number, **values(point, kind)}
        for number, point in enumerate(points, 1)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_longer_texts_that_are_cut_and_repeat_themselves_are_reported_once(kind: str) -> None:
    (result,) = text_warnings(series(*[CALM] * 5, *[AWAY] * 20, kind=kind))

    assert (result["stage"], result["kind"]) == ("student", kind)
    assert f"{KINDS[kind].length} rose from 100 to 233" in result["message"]
    # An entropy that explodes is like one that collapses; texts that get shorter do not run away.
    assert text_warnings(series(*[CALM] * 3, *[AWAY._replace(entropy=6.0)] * 3, kind=kind))
    assert text_warnings(series(*[AWAY] * 6, *[CALM] * 12, kind=kind)) == []


def test_both_kinds_and_every_stage_have_a_warning_of_their_own() -> None:
    expected = [(stage, kind) for stage in ("first", "second") for kind in KINDS]
    points = [*[CALM] * 3, *[AWAY] * 3]

    result = text_warnings(
        record for stage, kind in expected for record in series(*points, kind=kind, stage=stage)
    )

    assert [(one["stage"], one["kind"]) for one in result] == expected


@pytest.mark.parametrize(
    "after",
    [
        AWAY._replace(length=LONGER * CALM.length - 1),
        AWAY._replace(truncated=CALM.truncated + MORE_TRUNCATED - 0.01),
        AWAY._replace(entropy=CALM.entropy / 1.4),
        AWAY._replace(entropy=CALM.entropy * 1.4),
    ],
    ids=["length", "truncated", "entropy falls", "entropy rises"],
)
def test_all_three_must_change(after: TextPoint) -> None:
    assert text_warnings(series(*[CALM] * 6, *[after] * 12)) == []


@given(st.integers(0, 10_000))
def test_stable_noise_is_no_alarm(seed: int) -> None:
    """64 texts of random lengths, cut at random, per value; 200 values."""
    rng = random.Random(seed)
    points = [
        TextPoint(
            sum(rng.expovariate(1 / 100) for _ in range(64)) / 64,
            sum(rng.random() < 0.3 for _ in range(64)) / 64,
            rng.gauss(2.0, 0.15),
        )
        for _ in range(200)
    ]

    assert text_warnings(series(*points)) == []


def test_values_that_are_missing_or_not_finite_are_passed_over() -> None:
    broken = [
        {"stage": "student", "step": 5, "eval/text_tokens": 1.0},
        {"stage": "student", "step": 6, **values(CALM._replace(entropy=float("nan")))},
        {"stage": "student", "step": 7, **values(CALM), "eval/text_entropy": None},
        {"step": 8, **values(CALM)},
    ]

    assert text_warnings([*series(*[CALM] * 3), *broken, *series(*[AWAY] * 2)]) == []
    assert text_warnings([*series(*[CALM] * 3), *broken, *series(*[AWAY] * 3)])


def log(folder: Path, points: list[TextPoint], *, start: int = 0) -> None:
    """Logs the points of the steps after `start`, as a start of a run does."""
    reporter = Reporter(folder, is_main=True)
    reporter.begin("student", Extent(step=start, total_steps=100, steps_per_epoch=10))
    for step, point in enumerate(points[start:], start + 1):
        reporter.log(step, values(point), stage="student")
    reporter.close()


def test_a_resumed_run_warns_at_the_same_step_and_does_not_warn_again(tmp_path, caplog) -> None:
    points = [*[CALM] * 4, *[AWAY] * 4]

    with caplog.at_level(logging.WARNING):
        log(tmp_path, points[:5])
        assert "run away" not in caplog.text
        log(tmp_path, points[:6], start=4)
        assert caplog.text.count("student, step 6: the generated texts run away") == 1
        log(tmp_path, points, start=6)

    assert caplog.text.count("run away") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [one["step"] for one in text_warnings(map(json.loads, lines))] == [6]
