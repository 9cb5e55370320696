"""Runs that are killed, stopped, starved and damaged lose nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks/faults.py"


@pytest.mark.slow
def test_two_minutes_of_faults_are_survived():
    command = [sys.executable, str(PROGRAM), "--minutes", "2"]
    # Many times what two minutes of faults take, for a busy machine.
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)

    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "; 0 lost" in ended.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "1", "--cases", "minidisk"], "'minidisk' is none of labels, "),
    ],
)
def test_settings_that_cannot_be_are_named(capsys, words, message):
    from faults import parse  # here, because it changes the path of modules

    with pytest.raises(SystemExit) as stopped:
        parse(words)

    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
