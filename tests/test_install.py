"""`make install` says what a machine lacks before it touches anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, folder)
    return folder


@pytest.fixture
def python_without(tmp_path: Path) -> Path:
    """An interpreter that fails at whatever names the word in its `LACKS` variable."""
    program = tmp_path / "python-that-lacks"
    program.write_text(
        f'#!/bin/sh\ncase "$2" in *"$LACKS"*) exit 1;; esac\nexec {sys.executable} "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program


def make_install(
    checkout: Path, *settings: str, lacks: str = ""
) -> subprocess.CompletedProcess[str]:
    # A suite that was itself started by make must not hand its settings down.
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL"}}
    where = {"cwd": checkout, "env": environment | {"LACKS": lacks}}
    command = ["make", "install", *settings]
    return subprocess.run(command, capture_output=True, text=True, check=False, **where)


@pytest.mark.parametrize(
    ("settings", "lacks", "told"),
    [
        *(
            (f"PYTHON={python}", "", f"python 3.11 to 3.13 (tried: {python}); choose one with ")
            for python in ("no-such-python", "false")
        ),
        ("PYTHON={}", "import venv", "the venv module of {}"),
        ("PYTHON={}", "Python.h", "the headers of {}"),
        (f"PYTHON={sys.executable} CXX=no-such-compiler", "", "no-such-compiler, the C++ compiler"),
    ],
    ids=["no Python", "too old a Python", "venv", "headers", "compiler"],
)
def test_what_a_machine_lacks_is_one_line_and_nothing_is_made(
    checkout, python_without, settings, lacks, told
):
    words = settings.format(python_without).split()

    done = make_install(checkout, *words, lacks=lacks)

    assert done.returncode != 0
    assert not (checkout / ".venv").exists()
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("missing: "))
    assert line.startswith(f"missing: {told.format(python_without)}")


def test_a_finished_environment_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed").touch()

    assert make_install(checkout, "PYTHON=no-such-python").returncode == 0
