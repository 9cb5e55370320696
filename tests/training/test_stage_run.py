"""A stage continues from its checkpoint or its result, or is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megakd.errors import CheckpointError
from megakd.process.seals import write_finished
from megakd.stage import StageResult
from megakd.training.stage_folder import RESULT, read_result, result_text

LENGTH = {"max_steps": 12, "num_train_epochs": 3.0}


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
    write_finished(folder, {RESULT: result_text(result, LENGTH)})
    return result


def test_a_finished_stage_is_taken_as_it_was_and_may_have_metrics_that_are_no_numbers(tmp_path):
    assert read_result(tmp_path / "student", LENGTH) is None
    result = written(tmp_path / "student", scores={"w": {"mine": math.inf}})

    actual = read_result(tmp_path / "student", LENGTH)

    assert math.isnan(actual.scores["w"]["mine"])
    assert replace(actual, scores=result.scores) == result
    text = (tmp_path / "student" / RESULT).read_text()
    assert json.loads(text)["length"] == LENGTH


def test_a_result_that_is_damaged_or_of_another_version_is_named_with_what_to_remove(tmp_path):
    folder = tmp_path / "student"
    written(folder)
    text = (folder / RESULT).read_text()

    (folder / RESULT).write_text(text.replace("0.5", "0.9"))
    with pytest.raises(CheckpointError, match=f"checksum of {RESULT} differs; remove {folder}"):
        read_result(folder, LENGTH)
    write_finished(folder, {RESULT: text.replace("metrics", "measured")})
    message = f"{RESULT} is not a result of this version .*; remove {folder}"
    with pytest.raises(CheckpointError, match=message):
        read_result(folder, LENGTH)
