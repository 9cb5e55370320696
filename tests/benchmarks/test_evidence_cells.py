"""The stored cells of the evidence: what is written is read, and other files are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from stored_cells import cells, example, stored

from evidence.cells import (
    StoredCellError,
    TeacherGate,
    paired,
    read_stored,
    stored_path,
    with_cells,
    write_stored,
)


def test_what_is_written_is_read(tmp_path):
    teacher = TeacherGate(teacher="two", seed=3, scores=(1.0, 2.0), final=3.0)
    written = stored(
        cells("a", (1.0, 2.0), details={"weight": 0.25}, divergence=None),
        lower_is_better=True,
        machine="2 cores",
        versions={"torch": "2"},
        teachers=(teacher,),
    )

    path = write_stored(tmp_path / "new", written)

    assert path == stored_path(tmp_path / "new", "madeup", "clinc150-few")
    assert read_stored(path, settings="0123") == written


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"version": 0}, ["version 0", "version 1"]),
        ({"settings": "other"}, ["madeup", "clinc150-few", "other", "0123"]),
        ({"cells": [{"arm": "a"}]}, ["missing"]),
        ({"cells": None}, ["no stored cells", "NoneType"]),
        ({"surprise": 1}, ["surprise"]),
        *(({"cells": [vars(cells("a", (score,))[0])]}, []) for score in (None, "80")),
    ],
)
def test_another_version_setting_or_form_is_refused_by_name(tmp_path, changes, names):
    path = write_stored(tmp_path, example())
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(StoredCellError) as refused:
        read_stored(path, settings="0123")
    assert all(name in str(refused.value) for name in [str(path), *names])


def test_a_new_cell_replaces_that_of_its_arm_seed_and_basis_alone():
    before = stored(cells("a", (1.0, 2.0)), cells("a", (3.0,), basis="cost"), cells("b", (4.0,)))
    after = with_cells(before, cells("a", (9.0,)))
    assert [cell.score for cell in after.cells] == [9.0, 2.0, 3.0, 4.0]
    assert after.arms() == ["a", "b"]


def test_pairs_are_those_of_values_that_both_have_and_equal_cost_is_paired_at_equal_steps():
    result = stored(
        cells("a", (4.0, 9.0), basis="cost"),
        cells("b", (1.0,), divergence=0.75),
        cells("a", (2.0, 5.0), divergence=0.5),
        cells("c", (1.0,), divergence=None),
    )
    losses = dataclasses.replace(result, lower_is_better=True)

    assert paired(result, "a", "b", basis="steps") == [1.0]
    assert paired(losses, "a", "b", basis="steps") == [-1.0]
    assert paired(result, "a", "b", basis="cost") == [3.0]
    assert paired(result, "b", "a", basis="cost") == []
    assert paired(result, "a", "b", basis="steps", value="divergence") == [0.25]
    assert paired(result, "c", "b", basis="steps", value="divergence") == []
