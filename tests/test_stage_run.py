"""How a stage is taken up: from its checkpoint, its result, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megakd.engine import distributed
from megakd.errors import CheckpointError
from megakd.stage import StageResult
from megakd.stage_run import RESULT, StageRun, read_result, result_text

FINGERPRINT = {"seed": 1, "train.learning_rate": 0.1}


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank without a process group."""
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)


def stage_with(checkpoint: Path, *, wanted: bool | str) -> Any:
    train = SimpleNamespace(resume_from_checkpoint=wanted)
    return SimpleNamespace(
        stage=SimpleNamespace(name="student", train=train),
        checkpoints=SimpleNamespace(
            folder=checkpoint.parent, given=lambda _: None, newest_good=lambda: checkpoint
        ),
    )


def test_a_stage_that_may_not_resume_refuses_to_write_over_its_checkpoints():
    newest = Path("checkpoints/student/step-8")

    message = f"{newest} is there and resume_from_checkpoint is false; use another output_dir"
    with pytest.raises(CheckpointError, match=message):
        StageRun._resume(stage_with(newest, wanted=False))


def written(folder: Path) -> StageResult:
    result = StageResult(
        name="student",
        folder=folder,
        metrics={"accuracy": 0.5},
        steps=12,
        seconds=1.5,
        tokens_per_second=100.0,
        peak_memory_bytes=10,
    )
    (folder / RESULT).write_text(result_text(result, FINGERPRINT))
    return result


def test_a_finished_stage_is_taken_as_it_was(tmp_path):
    result = written(tmp_path)

    assert read_result(tmp_path, FINGERPRINT) == result


def test_a_stage_without_a_result_has_not_finished(tmp_path):
    assert read_result(tmp_path, FINGERPRINT) is None


def test_the_result_of_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    written(tmp_path)

    message = r"holds the result of another config \(train.learning_rate: 0.1 there, 0.2 here\)"
    with pytest.raises(CheckpointError, match=message):
        read_result(tmp_path, {**FINGERPRINT, "train.learning_rate": 0.2})


def test_a_result_says_what_it_depends_on(tmp_path):
    written(tmp_path)

    assert json.loads((tmp_path / RESULT).read_text())["fingerprint"] == FINGERPRINT
