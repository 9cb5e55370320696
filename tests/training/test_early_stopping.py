"""When a stage ends because its evaluations no longer improve."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import review_task, run_in
from whole_run import finish, forgotten, read, records, same_weights

from megakd.stage import Verdict
from megakd.training.best import Best, Evaluation

EVALUATED_EVERY, PATIENCE, PLANNED = 2, 2, 10
STOPPED = EVALUATED_EVERY * (1 + PATIENCE)


@pytest.mark.parametrize(
    ("scores", "patience", "end"),
    [
        ([0.5, 0.6, 0.6, 0.6], 2, 4),  # a tie is no better score
        ([0.5, 0.4, 0.6, 0.5, 0.5], 2, 5),  # a better score starts the count again
        ([0.5, 0.4, 0.6, 0.5, 0.7], 2, None),
        ([0.5, math.nan, math.nan], 2, 3),
        ([math.nan, 0.5, 0.6], 2, None),
        ([-3.0, -2.0, -2.5], 1, 3),
        ([0.5] * 9, None, None),
    ],
)
def test_so_many_evaluations_in_a_row_without_a_better_score_end_a_stage(scores, patience, end):
    best = best_of(patience=patience)
    stale = [number for number, score in enumerate(scores, 1) if consider(best, score).is_stale]
    assert next(iter(stale), None) == end


def best_of(**options: Any) -> Best:
    """Evaluations whose weights are not written."""
    return Best(Path(), lambda *_: None, keeps=False, **options)


def consider(best: Best, score: float) -> Best:
    best.consider(1, Evaluation({}, None), Verdict(score, ""))
    return best


@pytest.mark.parametrize(("misses", "left"), [(2, 0), (1, 1)])
def test_a_stage_that_had_stopped_and_gets_more_steps_counts_again(misses, left):
    best = best_of(patience=2)
    for _ in range(1 + misses):
        consider(best, 0.5)

    best.extend()

    assert (best.misses, best.is_stale) == (left, False)


@pytest.fixture(scope="module")
def stopped(one_rank, tmp_path_factory) -> Path:
    """A config whose student stops early: without learning, no score rises."""
    folder = tmp_path_factory.mktemp("stopped")
    stops = {"early_stopping_patience": PATIENCE, "learning_rate": 0.0}
    config = run_in(
        folder,
        review_task(folder),
        eval={"eval_steps": EVALUATED_EVERY},
        save={"save_steps": 3},
        log={"logging_steps": 4},
        train={"max_steps": PLANNED, **stops},
    )
    outcome = finish(one_rank, config)
    assert f"student: stopped at step {STOPPED} of {PLANNED}" in outcome.err
    return config


def test_a_stage_that_stops_early_reports_the_steps_it_took_and_logs_the_last_of_them(stopped):
    out = stopped.parent / "out"

    assert read(out)["stages"][0]["steps"] == STOPPED
    assert {r["step"] for r in records(out, "student") if "train/loss" in r} == {4, STOPPED}
    assert (out / "checkpoints" / "student" / f"step-{STOPPED}").is_dir()


def test_a_killed_run_stops_at_the_same_step_with_the_same_weights(stopped, one_rank, tmp_path):
    out = stopped.parent / "out"
    copy = forgotten(out, tmp_path / "out", stage="student", after=3)

    finish(one_rank, stopped, f"output_dir={copy}")

    assert read(copy)["stages"][0]["steps"] == STOPPED
    assert same_weights(copy / "stages" / "student", out / "stages" / "student")
    # A stage that had stopped before it was killed has no step left.
    copy = forgotten(out, tmp_path / "ended", stage="student", after=STOPPED)
    finish(one_rank, stopped, f"output_dir={copy}")
    assert read(copy)["stages"][0]["steps"] == STOPPED


def test_a_stage_that_stopped_early_continues_when_the_run_gets_more_steps(
    stopped, one_rank, tmp_path
):
    out = Path(shutil.copytree(stopped.parent / "out", tmp_path / "out"))

    outcome = finish(one_rank, stopped, f"output_dir={out}", f"train.max_steps={2 * PLANNED}")

    assert f"student: finished with {STOPPED} steps and continues" in outcome.err
    assert read(out)["stages"][0]["steps"] == STOPPED + EVALUATED_EVERY * PATIENCE
