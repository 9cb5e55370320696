"""The benchmark of generation, in a tiny size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_both_kinds_of_generation_are_measured_and_printed(built_operator):
    sizes = ["--model", "1x64", "--vocabulary", "300", "--rows", "2", "--tokens", "3"]
    program = [sys.executable, "benchmarks/generation.py", "--ranks", "2", "--pairs", "2"]

    shown = subprocess.run(
        [*program, *sizes], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert shown.returncode == 0, shown.stderr
    assert "| gathered once against sharded, 0.1M, 2 ranks, 2 x 3 tokens each" in shown.stdout
    assert "target 0.35: " in shown.stdout
