"""The page of the evidence is drawn from its stored cells alone, with the numbers of the cells."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from stored_cells import RISING, MadeUp, example

from evidence.cells import STORED, StoredCellError, write_stored
from evidence.page import draw

PAGE = STORED.parent / "evidence.md"
MADE_UP = {"madeup": MadeUp()}
CELLS = "madeup-clinc150-few.json"
NOT_YET = "no cell of the evidence is stored yet"


@pytest.fixture
def docs(tmp_path):
    """A folder docs/ with stored cells of one comparison in two settings."""
    folder = tmp_path / "docs"
    write_stored(folder / "evidence", example())
    write_stored(folder / "evidence", example(setting="banking77", curve=RISING))
    return folder


def drawn(docs, comparisons=MADE_UP):
    draw(docs / "evidence", docs / "evidence.md", comparisons)
    return (docs / "evidence.md").read_text()


def unwrapped(page):
    return " ".join(page.split())


def rows_of(page, arm):
    return [line for line in page.splitlines() if re.match(rf"\| \**{arm}\** \|", line)]


def test_the_table_has_the_numbers_computed_by_hand(docs):
    page = drawn(docs)

    # Residuals of five arms and three seeds: deviation 0.2025 with 8 degrees of freedom, so the
    # standard error of a mean difference is 0.1653, and 2.306 of these are 0.381.
    row = rows_of(page, "best teacher")[0]
    assert row.startswith(
        "| best teacher | 3 | 79.93 (0.81) | -1.07 (-1.45 to -0.69) | - | <0.001 "
        "| -4.6 (0.045) | worse |"
    )
    assert row.endswith("| 0.2500 (0.0000) | 400 | 60 | 25,600 |")
    assert rows_of(page, "other")[0].startswith(
        "| other | 3 / 3 | 82.60 (1.10) / 81.00 (0.75) | +1.60 (+1.22 to +1.98) | "
        "+0.00 (-0.38 to +0.38) | <0.001 / 1.000 | +27.7 (0.001) / +0.0 (1.000) "
        "| better / cannot be told |"
    )
    assert "| 400 / 700 |" in rows_of(page, "other")[0]
    assert "| <0.001 | -151.0 (<0.001) | worse |" in rows_of(page, "labels")[0]
    assert "| **method** | 3 | 81.00 (1.00) | reference | reference |" in page


def test_drawing_twice_gives_the_same_bytes_and_the_order_of_cells_does_not_matter(docs):
    def files():
        return {
            path.name: path.read_bytes() for path in docs.rglob("*.*") if path.suffix != ".json"
        }

    drawn(docs)
    first = files()
    assert set(first) == {"evidence.md", "evidence-madeup.svg"}
    drawn(docs)
    assert files() == first

    result = example()
    write_stored(docs / "evidence", dataclasses.replace(result, cells=result.cells[::-1]))
    drawn(docs)
    assert files() == first


def test_notes_are_printed(docs):
    note = {"title": "Another title", "why": "The teacher is weak.", "tried": ["A", "B"]}
    notes = yaml.safe_dump({"madeup": {**note, "paper_start": "a pretrained model"}})
    (docs / "evidence/notes.yaml").write_text(notes)

    page = drawn(docs)

    assert "## Another title" in page
    assert "**Why.** The teacher is weak." in page
    assert "* A\n* B" in page
    assert "random weights (**the paper's: a pretrained model**)" in unwrapped(page)


@pytest.mark.parametrize(
    ("file", "change", "names"),
    [
        ("notes.yaml", ("", "madeup: {wy: x}"), ["madeup", "wy", "why"]),
        ("notes.yaml", ("", "other: {}"), ["other", "madeup"]),
        ("notes.yaml", ("", "- a"), []),
        ("notes.yaml", ("", "madeup: ["), []),
        (CELLS, ('"comparison": "madeup"', '"comparison": "gone"'), ["gone"]),
        (CELLS, ('"setting": "clinc150-few"', '"setting": "sst2-few"'), ["sst2-few"]),
    ],
)
def test_notes_and_cells_that_belong_elsewhere_are_refused_and_the_page_stays(
    docs, file, change, names
):
    path = docs / "evidence" / file
    path.touch()
    page = drawn(docs)
    path.write_text(path.read_text().replace(*change))

    with pytest.raises(StoredCellError) as refused:
        drawn(docs)

    assert all(name in str(refused.value) for name in [str(path), *names])
    assert (docs / "evidence.md").read_text() == page


@pytest.mark.slow
@pytest.mark.skipif(not list(STORED.glob("*.json")), reason=NOT_YET)
def test_the_page_in_the_repository_is_that_of_its_stored_cells(tmp_path):
    # The links of the page depend on where the cells lie.
    (tmp_path / "evidence").symlink_to(STORED)
    draw(tmp_path / "evidence", tmp_path / "evidence.md")
    assert (tmp_path / "evidence.md").read_text() == PAGE.read_text()
    names = sorted(path.name for path in (tmp_path / "images").glob("*"))
    assert names == sorted(path.name for path in (PAGE.parent / "images").glob("evidence-*.svg"))
