"""The paired steps are measured from start to row, at a small size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "paired_steps.py"
SMALL = ["--pairs", "3", "--warm-up", "1", "--teacher", "2x32", "--student", "2x32"]
SMALL += ["--vocabulary", "60", "--rows", "2", "--length", "8", "--ranks", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pool", "kinds"])
def test_both_steps_are_taken_and_a_row_is_printed(what):
    said = subprocess.run(
        [sys.executable, str(PROGRAM), what, *SMALL], capture_output=True, text=True, check=False
    )

    assert said.returncode == 0, said.stderr
    assert "CPU time " in said.stdout
    assert f"`python benchmarks/paired_steps.py {what}" in said.stdout
    assert ("a teacher adds" in said.stdout) == (what == "pool")
