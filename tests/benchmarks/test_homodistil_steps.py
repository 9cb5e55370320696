"""The cost of a student's step after the cuts: what is measured, and how it is counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megakd.config.file import load_config
from megakd.contract.views import View

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import homodistil_steps  # noqa: E402


def rounds(whole: float, cut: float) -> list[dict]:
    return [{"whole": (whole, 0.1), "masked": (1.0, 0.1), "cut": (cut, 0.05)}] * 3


def test_the_run_is_masked_language_modelling_of_the_student_alone(tmp_path):
    homodistil_steps.write_run(tmp_path, homodistil_steps.parse(["--length", "8"]))

    config = load_config(tmp_path / "run.yaml")
    sizes = config.student.model.config
    assert (config.task.type, config.teacher) == ("mlm", None)
    assert (sizes["hidden_size"], sizes["num_attention_heads"]) == (384, 12)


def test_a_quarter_is_kept_of_every_width_and_all_heads():
    whole = View((12, 12), (1536, 1536), 384, 32)

    assert homodistil_steps.goal_of(whole, 0.25) == View((12, 12), (384, 384), 96, 8)


def test_a_ratio_is_of_the_sums_over_the_ranks(capsys):
    # Both ranks together: 8 seconds before, 2 after.
    by_rank = [rounds(6.0, 1.5), rounds(2.0, 0.5)]

    homodistil_steps.show(by_rank, homodistil_steps.parse([]))

    shown = capsys.readouterr().out
    assert "whole: 8000.0 ms of CPU time, sensitivities 200.00 ms" in shown
    assert "masked / whole: 0.250" in shown
    assert "cut / whole: 0.250 (95 %: 0.250 to 0.250)" in shown
    assert "target 0.25: met" in shown


def test_another_size_is_not_held_against_the_target(capsys):
    homodistil_steps.show([rounds(6.0, 1.5)], homodistil_steps.parse(["--quick"]))

    assert "target" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_cost_is_measured_and_printed():
    program = [sys.executable, "benchmarks/homodistil_steps.py", "--quick"]

    shown = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)

    assert shown.returncode == 0, shown.stderr
    assert "| student's part of a step, 25% of every width, 2x32, 1 rank(s)" in shown.stdout
