"""docs/adding-a-method.md, followed by a new contributor in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = ("megakd", "kernels", "launch", "ds_configs")
SUPPORT = ("tests/support", "tests/conftest.py", "tests/slow_tests.txt")
METHOD, TEST = "megakd/methods/born_again.py", "tests/methods/test_born_again.py"
CONFIG = ["--config", "launch/examples/born_again.yaml", "--print-config"]
SHOWN = "from megakd.cli import main, train_main\n"
SHOWN += f"main(['methods', 'born_again'])\ntrain_main({CONFIG})"


@pytest.fixture(scope="module")
def followed(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with the page's files in it."""
    copy = tmp_path_factory.mktemp("contributor")
    for part in (*PARTS, *SUPPORT, "pyproject.toml"):
        source, target = repository / part, copy / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    page = (repository / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    for name, text in re.findall(r"```\w+ (\S+)\n(.*?)```", page, re.DOTALL):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text, encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (("-c", SHOWN), ("generations: 2", "generations: 3")),
        (("-m", "pytest", "-q", TEST), ("2 passed",)),
        (("-m", "ruff", "check", METHOD, TEST), ("passed",)),
        (("-m", "ruff", "format", "--check", METHOD, TEST), ("already formatted",)),
    ],
    ids=["listed and configured", "tested", "linted", "formatted"],
)
def test_the_method_of_the_page_works_with_its_test_and_its_config(followed, command, shown):
    path = os.pathsep.join([str(followed), str(followed / "kernels")])

    output = subprocess.run(
        [sys.executable, *command],
        cwd=followed,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )

    assert output.returncode == 0, output.stdout + output.stderr
    assert all(text in output.stdout for text in shown)
