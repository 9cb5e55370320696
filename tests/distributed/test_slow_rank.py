"""A rank that is slow: what the log, the numbers and the report say of it."""

from __future__ import annotations

import re
import time
from unittest.mock import patch

import cases
import pytest
from tiny_runs import review_task, run_in
from whole_run import read, records

from megakd.engine import distributed
from megakd.training import stage_run

STEPS, DELAY_S, SLOW = 7, 0.3, 1


def command_with_slow_rank(*arguments: str) -> tuple[int, str]:
    move = stage_run.device_batch

    def moved(*given):
        if distributed.ranks().rank == SLOW:
            time.sleep(DELAY_S)
        return move(*given)

    with patch.object(stage_run, "device_batch", moved):
        return cases.command(*arguments)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_that_others_wait_for_is_named(command, tmp_path, stage):
    sections = {"train": {"max_steps": STEPS}, "log": {"logging_steps": 1}}
    student = {"deepspeed": f"zero{stage}"}
    config = run_in(tmp_path, review_task(tmp_path), student=student, **sections)

    case = "test_slow_rank.command_with_slow_rank"
    ended = command("--config", str(config), case=case, code=0)

    line = rf"student: rank {SLOW} on \S+ is slow: 0\.[3-9]\d s of computing"
    assert len(re.findall(line, ended.text)) == 1, ended.text
    logs = records(tmp_path / "out", "student")
    for log in [log for log in logs if "train/loss" in log][1:]:
        assert log[f"ranks/{SLOW}/waiting_seconds"] == 0
        assert log[f"ranks/{SLOW}/computing_seconds"] >= DELAY_S
        assert log[f"ranks/{1 - SLOW}/waiting_seconds"] >= 0.8 * DELAY_S
    warnings = read(tmp_path / "out")["warnings"]
    assert [one["kind"] for one in warnings].count("slow rank") == 1
    page = (tmp_path / "out/report.html").read_text()
    assert "Seconds of each rank between two logs" in page
    assert f"rank {SLOW}" in page
