"""A stage continues from its checkpoint or its result, or is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megakd.contract.stage import StageResult
from megakd.errors import CheckpointError
from megakd.storage.folders import CHECKSUMS, write_finished
from megakd.training.checkpoint import Checkpoints
from megakd.training.stage_folder import RESULT, read_result, result_text

FINGERPRINT = {"seed": 1, "train.learning_rate": 0.1}


def test_a_stage_that_may_not_resume_refuses_to_write_over_its_checkpoints():
    newest = Path("checkpoints/student/step-8")
    checkpoints: Any = SimpleNamespace(folder=newest.parent, newest_good=lambda: newest)

    message = f"{newest} exists and resume_from_checkpoint is false; use another output_dir"
    with pytest.raises(CheckpointError, match=message):
        Checkpoints.to_resume(checkpoints, wanted=False)


def written(folder: Path, **changes: Any) -> StageResult:
    result = StageResult(
        **{"metrics": {"accuracy": 0.5}, **changes},
        name="student",
        folder=folder,
        steps=12,
        seconds=1.5,
        tokens_per_second=100.0,
        peak_memory_bytes=10,
    )
    write_finished(folder, {RESULT: result_text(result, FINGERPRINT)})
    return result


@pytest.mark.parametrize(
    "changes",
    [{}, {"metrics": {"mine": math.nan}, "scores": {"w": {"mine": math.inf}}}],
    ids=["numbers", "no numbers"],
)
def test_a_finished_stage_is_taken_as_it_was(tmp_path, changes):
    assert read_result(tmp_path / "student", FINGERPRINT) is None
    result = written(tmp_path / "student", **changes)

    actual = read_result(tmp_path / "student", FINGERPRINT)

    assert actual is not None
    if changes:
        assert math.isnan(actual.metrics["mine"])
        assert math.isnan(actual.scores["w"]["mine"])
        actual = replace(actual, metrics=result.metrics, scores=result.scores)
    assert actual == result
    text = (tmp_path / "student" / RESULT).read_text()
    assert json.loads(text)["fingerprint"] == FINGERPRINT


def test_the_result_of_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    written(tmp_path / "student")

    message = r"holds the result of another config \(train.learning_rate: 0.1 there, 0.2 here\)"
    with pytest.raises(CheckpointError, match=message):
        read_result(tmp_path / "student", {**FINGERPRINT, "train.learning_rate": 0.2})


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("0.5", "0.9"))


def truncate(path: Path) -> None:
    path.write_text(path.read_text()[:20])


def of_another_version(path: Path) -> None:
    record = {"fingerprint": FINGERPRINT, "name": "student"}
    write_finished(path.parent, {RESULT: json.dumps(record)})


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (edit, RESULT, f"is damaged: the checksum of {RESULT} differs"),
        (of_another_version, RESULT, f"{RESULT} is not a result of this version"),
        *(
            (damage, name, name)
            for damage in (truncate, Path.unlink)
            for name in (RESULT, CHECKSUMS)
        ),
    ],
)
def test_a_damaged_file_of_a_finished_stage_is_named_with_what_to_remove(
    tmp_path, damage, name, message
):
    folder = tmp_path / "student"
    written(folder)
    damage(folder / name)

    with pytest.raises(CheckpointError, match=f"{message}.*; remove {folder}"):
        read_result(folder, FINGERPRINT)
