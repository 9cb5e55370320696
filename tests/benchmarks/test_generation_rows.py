"""The benchmark of rows that leave the batch, in a tiny size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_three_kinds_of_batches_give_the_same_texts_and_their_ratios():
    sizes = ["--model", "1x64", "--vocabulary", "300", "--rows", "6", "--tokens", "12"]
    program = [sys.executable, "benchmarks/generation_rows.py", "--pairs", "2", "--prompt", "12"]

    shown = subprocess.run(
        [*program, *sizes, "--ends", "40"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert shown.returncode == 0, shown.stderr
    for title in ("leave / stay, temperature 0", "leave / paged", "leave / stay, temperature 1"):
        assert f"| {title}" in shown.stdout
    assert "CPU time" in shown.stdout
