"""Any cut of a value is read as any other cut of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakd.engine import student
from megakd.engine.optimizer_state import StoredParts, file_of
from megakd.engine.student import StudentEngine
from megakd.errors import CheckpointError
from megakd.storage.checksums import write_files

SIZE = 23


def write(folder: Path, cuts: list[int]) -> torch.Tensor:
    """Write the parts of a value between some places, a rank each; return the whole."""
    whole, ends = torch.arange(float(SIZE)), [0, *sorted(cuts), SIZE]
    for rank, (first, last) in enumerate(pairwise(ends)):
        parts = {"weight": {"w": whole[first:last]} if last > first else {}}
        write_files(folder, file_of(rank, parts, offsets={"w": first}, facts={"steps": 3}))
    return whole


@given(st.lists(st.integers(0, SIZE), max_size=5), st.integers(0, SIZE), st.integers(0, SIZE))
def test_every_slice_is_read_from_whichever_ranks_have_it(tmp_path_factory, cuts, one, other):
    folder = tmp_path_factory.mktemp("parts")
    whole, wanted = write(folder, cuts), slice(*sorted((one, other)))

    stored = StoredParts(folder)

    assert torch.equal(stored.read("weight", "w", wanted), whole[wanted])
    assert stored.size("weight", "w") == SIZE
    assert (stored.names, stored.facts) == ({"weight": ["w"]}, {"steps": 3})


def test_a_part_that_is_not_there_is_an_error_before_anything_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(student, "together", lambda read: read())
    write(tmp_path, [9])
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(SIZE))})
    optimizer: Any = torch.optim.SGD(model.parameters())
    engine: Any = SimpleNamespace(optimizer=optimizer, module=model, train=model.train)

    (tmp_path / "engine-1.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds 9 of 23 values of weight of w: files are mis"
    ):
        StudentEngine(engine).load(tmp_path)

    assert not model["w"].any()
    (tmp_path / "engine-0.pt").unlink()
    with pytest.raises(CheckpointError, match="has no engine-<rank>"):
        StudentEngine(engine).load(tmp_path)
