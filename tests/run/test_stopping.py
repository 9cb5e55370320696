"""A run that is told to stop saves at the next step and goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import review_task, run_in
from whole_run import finish, records, same_weights

STEPS = 8
# What does not depend on how long things take.
LOSS, SCORE = "train/loss", "eval/accuracy"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Logs, evaluates and saves at steps that no stop in this file falls on."""
    folder = tmp_path_factory.mktemp("stopping")
    sections = {"train": {"max_steps": STEPS}, "save": {"save_steps": 7}}
    return run_in(folder, review_task(folder), eval={"eval_steps": 4}, **sections)


@pytest.fixture(scope="module")
def truth(one_rank, config, tmp_path_factory) -> Path:
    """The run without a stop, which saves where its config says."""
    out = tmp_path_factory.mktemp("truth") / "out"
    finish(one_rank, config, f"output_dir={out}")
    assert saved(out) == {"step-7", f"step-{STEPS}"}
    return out


def logged(out: Path) -> list[dict[str, Any]]:
    kept = ("step", LOSS, SCORE)
    return [{k: r[k] for k in kept if k in r} for r in records(out, "student")]


def saved(out: Path) -> set[str]:
    return {path.name for path in (out / "checkpoints" / "student").glob("step-*")}


@pytest.mark.parametrize(
    ("stop", "at"),
    [
        # The evaluation of step 4 comes before the checkpoint: a resumed run does not repeat it.
        pytest.param(3, 4, id="where an evaluation is due"),
        pytest.param(STEPS, STEPS, id="after the last step"),
    ],
)
def test_a_stopped_run_saves_once_and_ends_as_if_it_had_never_been_stopped(
    one_rank, config, truth, tmp_path, stop, at
):
    out = tmp_path / "out"

    outcome = one_rank.train("--config", config, f"output_dir={out}", stop_at=("student", stop))

    assert outcome.code == 143, outcome.err
    assert outcome.err.splitlines()[-1] == (
        f"megakd: stopped by SIGTERM, student saved at step {at}; start the same command again "
        "to continue"
    )
    assert f"step-{at}" in saved(out)
    assert not (out / "report.json").exists()
    assert not (out / "lock.json").exists()
    outcome = finish(one_rank, config, f"output_dir={out}")
    assert f"student: resumed at step {at} from" in outcome.err
    assert same_weights(out / "final", truth / "final")
    assert logged(out) == logged(truth)
