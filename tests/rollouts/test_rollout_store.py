"""Rollouts on disk: read as they were written, and never taken from another run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megakd.contract.completions import Completion, Rollout
from megakd.errors import DataError
from megakd.rollouts.store import RolloutStore, read_rollouts, rollout_files

_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(tuple)
_rollouts = st.builds(
    Rollout,
    row=st.integers(0, 2**40),
    prompt=_ids,
    completion=st.builds(Completion, ids=_ids, finished=st.booleans()),
    version=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
)
_TEXT = Rollout(3, (1, 2), Completion((5, 6), finished=True), version=7, seed=9)


@given(texts=st.lists(_rollouts, max_size=4))
def test_texts_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[Rollout]
) -> None:
    store = RolloutStore(tmp_path_factory.mktemp("store"))

    store.write(12, texts)

    assert store.has(12)
    assert not store.has(11)
    assert store.read(12) == texts


@given(texts=st.lists(_rollouts, min_size=1, max_size=4), part=st.floats(0, 1, exclude_max=True))
def test_one_text_is_read_as_among_all(
    tmp_path_factory: pytest.TempPathFactory, texts: list[Rollout], part: float
) -> None:
    store = RolloutStore(tmp_path_factory.mktemp("store"))
    store.write(3, texts)

    assert store.read_one(3, part) == texts[int(part * len(texts))]


def test_one_text_is_read_from_a_damaged_file_or_the_file_is_named(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.write(4, [_TEXT, _TEXT])
    (path,) = rollout_files(tmp_path)
    path.write_text(path.read_text()[:-9] + "\n")

    assert store.read_one(4, 0.0) == _TEXT
    with pytest.raises(DataError, match=r"step-00000004\.jsonl"):
        store.read_one(4, 0.9)


def test_texts_before_a_step_are_removed_except_for_some(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    for step in range(6):
        store.write(step, [_TEXT])

    store.remove_before(4, kept=[1, 5])

    assert [step for step in range(6) if store.has(step)] == [1, 4, 5]


def test_texts_of_an_equal_run_are_kept(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path / "student")
    store.begin({"seed": 1})
    store.write(0, [_TEXT])

    RolloutStore(tmp_path / "student").begin({"seed": 1})

    assert store.read(0) == [_TEXT]


def test_texts_of_another_run_are_set_aside_and_not_lost(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        store = RolloutStore(tmp_path / "student")
        store.begin({"seed": seed})
        assert not store.has(0)
        store.write(0, [_TEXT._replace(seed=seed)])

    names = ("student.before-1", "student.before-2", "student")
    assert [RolloutStore(tmp_path / name).read(0)[0].seed for name in names] == [1, 2, 3]


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_damaged_file_is_named(tmp_path: Path, kept: float) -> None:
    store = RolloutStore(tmp_path)
    store.write(4, [_TEXT, _TEXT])
    (path,) = rollout_files(tmp_path)
    text = path.read_text()
    path.write_text(text[: int(kept * len(text)) if kept < 1 else int(kept)])

    with pytest.raises(DataError, match=r"step-00000004\.jsonl"):
        store.read(4)


def test_a_file_that_lacks_a_line_is_named(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    store.write(4, [_TEXT, _TEXT])
    (path,) = rollout_files(tmp_path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))

    with pytest.raises(DataError, match="holds 1 rollouts instead of 2"):
        read_rollouts(path)


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    RolloutStore(tmp_path).write(4, [])
    (path,) = rollout_files(tmp_path)
    path.write_text(path.read_text().replace('"format":1', '"format":2'))

    with pytest.raises(DataError, match="format 2, and this version reads format 1"):
        read_rollouts(path)
