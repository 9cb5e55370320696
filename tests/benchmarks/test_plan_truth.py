"""What `megakd plan` predicts is what a run takes: two short runs on CPU ranks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
# Loaded by its path: `plan` is a common name.
_SPEC = importlib.util.spec_from_file_location("plan_benchmark", BENCHMARKS / "plan.py")
assert _SPEC is not None
assert _SPEC.loader is not None
benchmark = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(benchmark)


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 6])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured(number: int) -> None:
    """In a process of its own: the plan counts the memory of the process that plans."""
    command = [sys.executable, str(BENCHMARKS / "plan.py"), "--cases", str(number)]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)

    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


def test_every_case_is_a_run_that_megakd_accepts(tmp_path: Path) -> None:
    for number, case in enumerate(benchmark.CASES):
        folder = tmp_path / str(number)
        folder.mkdir()

        assert benchmark.config_of(case, folder).train.max_steps == 3
