"""Checkpoints are whole or absent, checked before they are used, and never destroy one another."""

from __future__ import annotations

import errno
import random
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_store import (
    ALONE,
    FILES,
    SHARD,
    checkpoints,
    flip,
    load,
    names,
    read_nothing,
    save,
    states_of,
)

from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError
from megakd.process.seeding import random_state, seed_everything
from megakd.storage.folders import CHECKSUMS, entries
from megakd.training import checkpoint as checkpoint_module
from megakd.training.checkpoint import Checkpoints, check_plain
from megakd.training.stage_batches import check_stream


@pytest.fixture
def store(tmp_path) -> Checkpoints:
    return checkpoints(tmp_path)


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def test_state_and_random_numbers_come_back_after_the_shards_are_read(store):
    seed_everything(3, rank=0)
    folder = save(store, 4)
    wanted = draws()

    def read_shards(folder: Path) -> None:
        assert (folder / SHARD).is_file()
        draws()

    assert load(store, folder, read_shards) == {"step": 4, "window": 40}
    assert draws() == wanted


def test_tensors_of_a_gpu_are_read_to_the_device_of_the_rank(store, monkeypatch):
    """The file may be read on a node where the rank has another GPU."""
    values = {"average": torch.ones(3)}
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        folder = save(store, 4, values=values)

    store.load(folder, read_nothing, states_of(values))

    assert values["average"].device.type == "cpu"


def test_ranks_draw_different_dropout_and_the_same_everything_else():
    seed_everything(3, rank=0)
    first = draws()
    seed_everything(3, rank=1)
    second = draws()

    assert first[:2] == second[:2]
    assert first[2] != second[2]


@pytest.mark.parametrize(
    ("keep", "left"),
    [(1, ["step-12"]), (2, ["step-12", "step-8"]), (None, ["step-12", "step-4", "step-8"])],
)
def test_the_newest_complete_one_is_used_and_the_oldest_are_removed(tmp_path, keep, left):
    store = checkpoints(tmp_path, keep=keep)
    assert store.to_resume(resume=True) is None

    newest = save(store, 4, 8, 12)

    assert names(store) == left
    for name in ("best", "step-notes", "step-16.partial"):
        (store.folder / name).mkdir()
    assert store.to_resume(resume=True) == newest


@pytest.mark.parametrize(
    ("now", "may_grow", "goes_on"),
    [(8, True, True), (12, True, True), (12, False, False), (6, True, False), (None, True, False)],
)
def test_a_stage_may_get_longer_if_nothing_was_made_from_it(tmp_path, now, may_grow, goes_on):
    saved = save(checkpoints(tmp_path, length={"max_steps": 8}), 8)
    store = checkpoints(tmp_path, length={"max_steps": now}, may_grow=may_grow)

    if goes_on:
        assert store.to_resume(resume=True) == saved
        assert store.load(saved, read_nothing, states_of({"step": None})) == (1, now != 8)
    else:
        with pytest.raises(CheckpointError, match=f"max_steps: 8 there, {now} here"):
            store.to_resume(resume=True)


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({"keep": 2, "may_grow": True, "stays": True}, ["step-8"]),
        ({"keep": None, "stays": True}, ["step-4", "step-8"]),
        ({"stays": True}, []),
        ({"may_grow": True}, []),
    ],
)
def test_a_finished_stage_leaves_what_a_longer_one_reads(tmp_path, keys, left):
    store = checkpoints(tmp_path, **keys)
    save(store, 4, 8)
    store.finish()
    assert (names(store) if store.folder.exists() else []) == left


def test_a_checkpoint_of_another_stage_is_refused(store, tmp_path):
    shutil.copytree(save(store, 4), tmp_path / "alone" / "step-4")
    other = Checkpoints(folder=tmp_path / "alone", keep=2, ranks=ALONE)
    with pytest.raises(CheckpointError, match=r"alone/step-4 was written by another"):
        other.to_resume(resume=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [
    *((name, flip, f"the checksum of {name} differs") for name in FILES),
    (SHARD, cut, rf"{SHARD} has \d+ bytes, \d+ were written"),
    (SHARD, Path.unlink, f"{SHARD} is missing"),
    (CHECKSUMS, Path.unlink, "its manifest cannot be read"),
]


@pytest.mark.parametrize(("name", "spoil", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_named_with_the_folder_to_remove(
    store, name: str, spoil: Callable[[Path], None], reason: str
):
    newest = save(store, 4, 8)
    spoil(newest / name)

    with pytest.raises(CheckpointError, match=rf"^{newest} is damaged: {reason}.*remove {newest}"):
        store.to_resume(resume=True)
    shutil.rmtree(newest)
    assert store.to_resume(resume=True) == store.folder / "step-4"


def test_the_manifest_names_what_was_written_even_if_a_listing_does_not_show_it(store, monkeypatch):
    with monkeypatch.context() as stale:
        stale.setattr(Path, "rglob", lambda *_: iter(()))
        newest = save(store, 4)

    flip(newest / SHARD)
    assert store.damage(newest) == f"the checksum of {SHARD} differs"
    assert entries(newest).keys() == set(FILES)


def test_a_stage_that_may_not_resume_refuses_to_write_over_its_checkpoints(store):
    newest = save(store, 8)

    message = f"{newest} exists and resume_from_checkpoint is false; use another output_dir"
    with pytest.raises(CheckpointError, match=message):
        store.to_resume(resume=False)


def test_other_ranks_read_a_checkpoint_and_keep_their_own_random_numbers_but_no_stream(tmp_path):
    values: dict[str, Any] = {"step": 4, "batches": {"step": 4, "places": [{}]}}
    folder = save(checkpoints(tmp_path), 4, values=values)
    third = Ranks(rank=2, world_size=4, local_rank=2, device=torch.device("cpu"))
    seed_everything(5, rank=2)
    before, read = random_state(), dict.fromkeys(values)

    writers = checkpoints(tmp_path, ranks=third).load(folder, read_nothing, states_of(read))

    assert (writers, read) == ((1, False), values)
    assert torch.equal(random_state()["torch"], before["torch"])
    with pytest.raises(CheckpointError, match="a stream that 1 ranks have read, and this run has"):
        check_stream(folder, third)
    check_stream(folder, ALONE)


def test_an_old_one_that_cannot_be_removed_does_not_stop_the_run(tmp_path, caplog, monkeypatch):
    store = checkpoints(tmp_path, keep=1)
    save(store, 4)

    def busy(path: Path, **_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", busy)

    assert save(store, 8) == store.to_resume(resume=True)
    assert "step 4 in " in caplog.text


class Counted(NamedTuple):
    """A class that a later version may have moved."""

    value: int


@pytest.mark.parametrize(
    "value", [np.float64(1.0), {"inner": [Counted(3)]}, {Counted(3): 1}, deque([1])], ids=repr
)
def test_an_object_of_a_class_is_refused_before_it_gets_into_a_checkpoint(value):
    with pytest.raises(TypeError, match="plain values"):
        check_plain({"strategy": value})


def test_a_checkpoint_of_another_version_is_refused_in_one_line(store, monkeypatch):
    saved = save(store, 3)
    torch.save({"strategy": Counted(3)}, saved / "state.pt")
    with monkeypatch.context() as earlier:
        earlier.setattr("megakd.training.checkpoint.FORMAT", 1)
        save(store, 4)

    message = rf"^{store.folder}.*another version of megakd.*$"
    for read in (lambda: load(store, saved), lambda: store.to_resume(resume=True)):
        with pytest.raises(CheckpointError, match=message) as refused:
            read()
        assert "\n" not in str(refused.value)
