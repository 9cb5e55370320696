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
    return subprocess.run(
        ["make", "install", *settings],
        cwd=checkout,
        env=environment | {"LACKS": lacks},
        capture_output=True,
        text=True,
        check=False,
    )


def complaint(checkout: Path, *settings: str, lacks: str = "") -> str:
    """Return the only line about what is missing; nothing is made."""
    done = make_install(checkout, *settings, lacks=lacks)
    assert done.returncode != 0
    assert not (checkout / ".venv").exists()
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("missing: "))
    return line.removeprefix("missing: ")


@pytest.mark.parametrize("python", ["no-such-python", "false"], ids=["absent", "too old"])
def test_an_interpreter_that_cannot_serve_is_named(checkout: Path, python: str) -> None:
    assert complaint(checkout, f"PYTHON={python}") == (
        f"python 3.11 to 3.13 (tried: {python}); choose one with make PYTHON=…"
    )


@pytest.mark.parametrize(
    ("lacks", "part"),
    [("import venv", "the venv module of "), ("Python.h", "the headers of ")],
    ids=["venv", "headers"],
)
def test_a_part_of_the_interpreter_that_is_missing_is_named(checkout, python_without, lacks, part):
    line = complaint(checkout, f"PYTHON={python_without}", lacks=lacks)
    assert line.startswith(f"{part}{python_without}")


def test_a_missing_compiler_is_named(checkout: Path) -> None:
    line = complaint(checkout, f"PYTHON={sys.executable}", "CXX=no-such-compiler")
    assert line.split(" (")[0] == "no-such-compiler, the C++ compiler"


def test_a_finished_environment_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed").touch()

    assert make_install(checkout, "PYTHON=no-such-python").returncode == 0
