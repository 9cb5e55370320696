"""The page on model families says what the command that prints it says."""

from __future__ import annotations

import importlib.util
import sys

import pytest
from tiny_families import TYPES, small_config


@pytest.fixture(scope="module")
def families(repository):
    """The program that prints the page."""
    path = repository / "benchmarks" / "families.py"
    specification = importlib.util.spec_from_file_location("families_page", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules["families_page"] = module  # for its annotations
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("task", "family"),
    [("causal_lm", "llama"), ("causal_lm", "olmo2"), ("mlm", "modernbert")],
)
def test_the_row_of_a_family_is_what_the_command_prints(repository, families, task, family):
    page = (repository / "docs" / "families.md").read_text(encoding="utf-8")
    _, _, table = page.partition(f"## {families.TITLES[task]}")
    row = families.row_of(family, small_config(family, task, families.LAYERS), task)

    cells = families.cells_of(row, 6 if task == "causal_lm" else 5)
    lines = table.partition("\n## ")[0].splitlines()
    assert [line for line in lines if f"`{family}`" in line and line.startswith("| ")] == [
        line for line in lines if line.startswith(f"{cells} `")
    ]


def test_every_family_of_transformers_is_on_the_page(repository):
    page = (repository / "docs" / "families.md").read_text(encoding="utf-8")
    tables = page[page.index("\n## Decoders") :]
    missing = [name for names in TYPES.values() for name in names if name not in tables]
    assert missing == []
