"""docs/adding-a-method.md, followed by a new contributor in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ("megakd", "kernels", "launch", "ds_configs", "tests/support", "tests/conftest.py")


@pytest.fixture(scope="module")
def followed(
    built_operator: None, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of the code with the page's files in it."""
    copy = tmp_path_factory.mktemp("contributor")
    for part in (*PARTS, "pyproject.toml"):
        source, target = repository / part, copy / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    # The operators of DeepSpeed that the tests have compiled already.
    (copy / ".cache").symlink_to(repository / ".cache")
    page = (repository / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"```\w+ (\S+)\n(.*?)```", page, re.DOTALL):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text, encoding="utf-8")
    return copy


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_pages_method_is_found_and_its_test_passes(followed):
    command = "from megakd.cli import main; main(['methods', 'born_again'])"
    listed = run(followed, "-c", command)
    tested = run(followed, "-m", "pytest", "-q", "tests/methods/test_born_again.py")

    assert "generations: 2" in listed.stdout, listed.stderr
    assert tested.returncode == 0, tested.stdout
    assert "2 passed" in tested.stdout


def test_the_pages_config_is_accepted(followed):
    shown = run(
        followed, "launch/train.py", "--config", "launch/examples/born_again.yaml", "--print-config"
    )

    assert shown.returncode == 0, shown.stderr
    assert "generations: 3" in shown.stdout


def test_the_pages_files_pass_the_linter(followed):
    files = ["megakd/methods/born_again.py", "tests/methods/test_born_again.py"]

    checked = run(followed, "-m", "ruff", "check", *files)
    formatted = run(followed, "-m", "ruff", "format", "--check", *files)

    assert checked.returncode == 0, checked.stdout
    assert formatted.returncode == 0, formatted.stdout
