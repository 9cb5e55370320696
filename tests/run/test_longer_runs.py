"""A finished run that is started again with more steps goes on where it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from one_rank import Outcome
from tiny_runs import bert
from whole_run import read, same_weights


@pytest.fixture
def start(bench) -> Callable[..., Outcome]:
    """Start a run that saves at every step: `start(output folder, settings of training)`."""

    def run(out: str, train: dict[str, Any], **sections: Any) -> Outcome:
        constant = {"lr_scheduler_type": "constant", "max_steps": None, **train}
        save = {"save_steps": 1, "save_total_limit": 2, "keep": True, **(sections.pop("save", {}))}
        tree = bench.tree(train=constant, save=save, **sections)
        return bench.start(tree, f"output_dir={bench.folder / out}")

    return run


def test_a_longer_run_has_the_weights_of_one_that_was_as_long_from_the_start(start, bench):
    alone, key = {"baselines": ["alone"]}, "num_train_epochs"
    start("whole", {"max_steps": 6}, **alone)
    assert start("out", {key: 0.1875}, **alone).code == 0
    saved = (bench.folder / "out" / "checkpoints" / "student").glob("step-*")
    assert [path.name for path in saved] == ["step-3"]

    outcome = start("out", {key: 0.375}, **alone)

    assert outcome.code == 0, outcome.err
    assert "student: finished with 3 steps and continues" in outcome.err
    assert f"{key}: 0.1875 there, 0.375 here" in outcome.err
    steps = {stage["name"]: stage["steps"] for stage in read(bench.folder / "out")["stages"]}
    assert steps == {"student": 6, "alone": 6}
    assert same_weights(*(bench.folder / out / "final" for out in ("whole", "out")))


def test_a_finished_run_whose_checkpoints_were_removed_gets_no_more_steps(start, bench):
    gone = {"save": {"keep": False}}
    start("out", {"max_steps": 3}, **gone)
    assert not (bench.folder / "out" / "checkpoints" / "student").exists()

    outcome = start("out", {"max_steps": 4}, **gone)

    assert outcome.code == 2
    assert "stages/student has finished, and its checkpoints were removed" in outcome.err
    assert "train it again with save.keep=true" in outcome.err


def test_fewer_steps_are_refused_and_change_nothing(start, bench):
    start("out", {"max_steps": 3})
    student = bench.folder / "out" / "final" / "model.safetensors"
    before = student.read_bytes()

    outcome = start("out", {"max_steps": 2})

    assert outcome.code == 2
    assert "max_steps: 3 there, 2 here" in outcome.err
    assert student.read_bytes() == before


def test_a_stage_that_others_were_made_from_does_not_go_on(start, bench):
    teacher = {"teacher": {"model": bert(2), "finetune": {}}}
    start("out", {"max_steps": 2}, **teacher)
    # No start reads its checkpoints again: its model is in stages/.
    assert not (bench.folder / "out" / "checkpoints" / "teacher-finetune").exists()

    outcome = start("out", {"max_steps": 4}, **teacher)

    assert outcome.code == 2
    assert "teacher-finetune" in outcome.err
    assert "max_steps: 2 there, 4 here" in outcome.err
