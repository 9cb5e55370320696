"""The documentation site builds, its links lead somewhere, and the code on its pages is code."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_families import TYPES, small_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}[^\n]*\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    # Strict: a link to a page or a heading that does not exist is an error.
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_navigation_and_can_be_searched(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))

    result = {entry["location"].partition("#")[0] for entry in index["docs"]}

    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    names = {page.with_suffix("").as_posix() for page in pages} - {"index"}
    assert {f"{name}/" for name in names} <= result
    listed = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert {f"{name}.md" for name in names} <= set(re.findall(r"[\w/-]+\.md", json.dumps(listed)))


@pytest.mark.parametrize(
    "name",
    [
        "megakd.training.lab.Lab.train",
        "megakd.stage.Strategy.before_update",
        "megakd.api.train",
        "megakd_kernels.linear_kd_loss",
    ],
)
def test_the_reference_comes_from_the_docstrings(site: Path, name: str) -> None:
    assert name in (site / "reference" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_on_a_page_is_valid(page: Path) -> None:
    for code in blocks(page, "python"):
        ast.parse(code)
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text) is not None


FAMILIES = ROOT / "docs" / "families.md"


@pytest.fixture(scope="module")
def families():
    """The program that prints the page on model families."""
    path = ROOT / "benchmarks" / "families.py"
    specification = importlib.util.spec_from_file_location("families_page", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["families_page"] = module  # for its annotations
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("task", "family"), [("causal_lm", "llama"), ("causal_lm", "falcon_h1"), ("mlm", "modernbert")]
)
def test_the_row_of_a_family_is_what_the_command_prints(families, task, family):
    _, _, table = FAMILIES.read_text(encoding="utf-8").partition(families.TITLE)
    row = families.row_of(family, small_config(family, task, families.LAYERS), task)

    (line,) = [line for line in table.splitlines() if f"`{family}`" in line]
    assert line.startswith(f"{row.cells} `")
    assert f"`{family}`{row.marks}, " in line


def test_every_family_of_transformers_is_on_the_page(families):
    _, _, table = FAMILIES.read_text(encoding="utf-8").partition(families.TITLE)
    assert [name for names in TYPES.values() for name in names if f"`{name}`" not in table] == []
