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


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("missing: ")]


@pytest.mark.parametrize("python", ["no-such-python", "false"], ids=["absent", "too old"])
def test_an_interpreter_that_cannot_serve_is_named(checkout: Path, python: str) -> None:
    done = make_install(checkout, f"PYTHON={python}")

    assert done.returncode != 0
    assert complaints(done) == [
        f"missing: python 3.11 to 3.13 (tried: {python}); choose one with make PYTHON=…"
    ]
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("lacks", "message"),
    [("import venv", "missing: the venv module of "), ("Python.h", "missing: the headers of ")],
    ids=["venv", "headers"],
)
def test_a_part_of_the_interpreter_that_is_missing_is_named(
    checkout: Path, python_without: Path, lacks: str, message: str
) -> None:
    done = make_install(checkout, f"PYTHON={python_without}", lacks=lacks)

    assert done.returncode != 0
    assert [c.startswith(f"{message}{python_without}") for c in complaints(done)] == [True]
    assert not (checkout / ".venv").exists()


def test_a_missing_compiler_is_named(checkout: Path) -> None:
    done = make_install(checkout, f"PYTHON={sys.executable}", "CXX=no-such-compiler")

    assert done.returncode != 0
    assert [c.split(" (")[0] for c in complaints(done)] == [
        "missing: no-such-compiler, the C++ compiler"
    ]
    assert not (checkout / ".venv").exists()


def test_a_finished_environment_is_left_alone(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed").touch()

    done = make_install(checkout, "PYTHON=no-such-python")

    assert done.returncode == 0
