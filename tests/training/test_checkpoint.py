"""Checkpoints are whole or absent, checked before they are used, and never destroy one another."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from megakd.process.files import write_tensors
from megakd.process.seals import CHECKSUMS, entries
from megakd.process.seeding import random_state, seed_everything
from megakd.training import checkpoint
from megakd.training import checkpoint as checkpoint_module
from megakd.training.batches import check_stream
from megakd.training.checkpoint import Checkpoints, check_plain


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
    assert store.to_resume() is None

    newest = save(store, 4, 8, 12)

    assert names(store) == left
    for name in ("best", "step-notes", "step-16.partial"):
        (store.folder / name).mkdir()
    assert store.to_resume() == newest


@pytest.mark.parametrize(
    ("now", "may_grow", "goes_on"),
    [(8, True, True), (12, True, True), (12, False, False), (6, True, False), (None, True, False)],
)
def test_a_stage_may_get_longer_if_nothing_was_made_from_it(tmp_path, now, may_grow, goes_on):
    saved = save(checkpoints(tmp_path, length={"max_steps": 8}), 8)
    store = checkpoints(tmp_path, length={"max_steps": now}, may_grow=may_grow)

    if goes_on:
        assert store.to_resume() == saved
        assert store.load(saved, read_nothing, states_of({"step": None})) == (1, now != 8)
    else:
        with pytest.raises(CheckpointError, match=f"max_steps: 8 there, {now} here"):
            store.to_resume()


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
        store.to_resume()
    shutil.rmtree(newest)
    assert store.to_resume() == store.folder / "step-4"


def test_the_manifest_names_what_was_written_even_if_a_listing_does_not_show_it(store, monkeypatch):
    with monkeypatch.context() as stale:
        stale.setattr(Path, "rglob", lambda *_: iter(()))
        newest = save(store, 4)

    flip(newest / SHARD)
    assert store.damage(newest) == f"the checksum of {SHARD} differs"
    assert entries(newest).keys() == set(FILES)


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

    assert save(store, 8) == store.to_resume()
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


def test_a_checkpoint_of_another_version_or_stage_is_refused_in_one_line(store, monkeypatch):
    saved, other = save(store, 3), store.folder.with_name("alone")
    torch.save({"strategy": Counted(3)}, saved / "state.pt")
    with monkeypatch.context() as earlier:
        earlier.setattr("megakd.training.checkpoint.FORMAT", 1)
        save(store, 4)
    alone = Checkpoints(folder=other, keep=2, ranks=ALONE)
    shutil.copytree(save(checkpoints(other), 4), other / "step-4")

    for refuse, folder in (
        (lambda: load(store, saved), store.folder),
        (store.to_resume, store.folder),
        (alone.to_resume, other),
    ):
        with pytest.raises(CheckpointError, match=rf"^{folder}.*another version of megakd") as told:
            refuse()
        assert "\n" not in str(told.value)


# Written beside the next steps; saves that fail or are killed.


class Held:
    """Holds every write of a file back until it is released, and can let it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released, self.error = threading.Event(), None
        self._write = checkpoint.write_files
        monkeypatch.setattr(checkpoint, "write_files", self._held)

    def _held(self, folder: Path, contents: Any) -> Any:
        assert self.released.wait(30)
        if self.error is not None:
            raise self.error
        return self._write(folder, contents)


@pytest.fixture
def held(monkeypatch) -> Held:
    return Held(monkeypatch)


class Training:
    """A weight and a state that every step changes."""

    def __init__(self, store: Checkpoints, *, beside: Any = True) -> None:
        self.writer = replace(store, beside=beside)
        self.weight, self.state = torch.zeros(4), {"average": torch.zeros(2), "steps": [0]}

    def step(self) -> None:
        self.weight += 1
        self.state["average"] += 1
        self.state["steps"][0] += 1

    def save(self, step: int, *, is_last: bool = False) -> None:
        states = states_of({"strategy": self.state})
        self.writer.save(step, {SHARD: {"weight": self.weight}}, states, is_last=is_last)


def stored(store: Any) -> tuple[float, dict[str, Any]]:
    values: dict[str, Any] = {"strategy": None}
    folder = store.to_resume()
    store.load(folder, lambda _: None, states_of(values))
    return torch.load(folder / SHARD)["weight"][0].item(), values["strategy"]


def test_a_checkpoint_has_the_values_of_its_step_and_no_name_while_it_is_written(store, held):
    training = Training(store)
    training.step()
    training.save(1)
    training.step()

    assert (training.writer.is_pending, training.writer.is_writing) == (True, True)
    assert names(store) == ["step-1.partial"]
    assert store.to_resume() is None
    held.released.set()
    training.writer.publish()

    assert (training.writer.is_pending, training.writer.is_writing) == (False, False)
    weight, state = stored(store)
    assert (weight, state["average"][0].item(), state["steps"]) == (1.0, 1.0, [1])


def test_the_next_save_and_the_last_one_wait_for_the_one_that_is_being_written(store, held):
    training = Training(store)
    training.save(1)
    threading.Timer(0.2, held.released.set).start()
    training.step()
    training.save(2)
    assert (store.folder / "step-1").is_dir()
    training.step()
    training.save(3, is_last=True)

    assert not training.writer.is_pending
    assert stored(store)[0] == 2.0
    assert names(store) == ["step-2", "step-3"]


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "free some space and start"), (errno.EACCES, "start")]
)
def test_a_failure_in_the_thread_is_told_when_the_checkpoint_would_get_its_name(
    store, held, number, remedy
):
    training, reason = Training(store), os.strerror(number)
    held.error = OSError(number, reason)
    training.save(8)
    held.released.set()

    message = rf"of step 8 could not be .*{reason}; .*, there is no earlier one; {remedy} the same"
    with pytest.raises(CheckpointError, match=message):
        training.writer.publish()

    assert names(store) == []
    assert not training.writer.is_pending


@pytest.mark.parametrize(("free", "beside"), [(10**6, True), (80, False)])
def test_a_copy_is_written_beside_the_training_if_the_free_memory_holds_it_twice(
    store, held, monkeypatch, caplog, free, beside
):
    caplog.set_level("INFO")
    monkeypatch.setattr(checkpoint, "free_memory_bytes", lambda _: free)
    training = Training(store, beside="auto")
    if not beside:
        held.released.set()

    training.save(1)

    assert training.writer.is_pending == beside
    assert ("saves stop the training" in caplog.text) != beside
    held.released.set()
    training.writer.close()


# A save that is killed or finds no space leaves a whole checkpoint behind.


class Killed(BaseException):
    """Stands for a SIGKILL: nothing that handles errors may see it."""


@contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ends the process at the n-th call that changes the disk, counted from 0."""
    calls = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if calls[0] == call:
                raise Killed
            calls[0] += 1
            return real(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in (
            (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (os, "fsync"), (os, "unlink"),
            (os, "rmdir"), (torch, "save"),
        ):  # fmt: skip
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield calls


def test_killed_at_any_moment_of_a_save_the_run_goes_on_from_a_whole_one(tmp_path, monkeypatch):
    survived: list[str] = []
    for call in range(1000):
        store = checkpoints(tmp_path / str(call), keep=1)
        save(store, 4)
        try:
            with killed_at(call, monkeypatch):
                save(store, 8)
        except Killed:
            good = store.to_resume()
            survived.append(good.name)
            assert load(store, good)["step"] == int(good.name.removeprefix("step-"))
            save(store, 12)
            assert names(store) == ["step-12"]
        else:
            break

    assert survived == sorted(survived)
    assert set(survived) == {"step-4", "step-8"}


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fails_for_lack_of_space(store: Checkpoints) -> None:
    with pytest.raises(
        CheckpointError,
        match=rf"^the checkpoint of step 8 could not be written to {store.folder}: "
        r"(No space left on device|File too large); nothing else was changed, the last good "
        rf"checkpoint is {store.folder}/step-4; free some space and start the same command again$",
    ):
        save(store, 8)


FULL = shutil._ntuple_diskusage(10, 9, 1)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("owner", "name", "fails"),
    [
        (checkpoint.shutil, "disk_usage", lambda _: FULL),
        (checkpoint, "write_files", full_disk),
        (os, "fsync", full_disk),
        (Path, "rename", full_disk),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_disk_that_is_full_or_fills_up_destroys_nothing(kept, monkeypatch, owner, name, fails):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        fails_for_lack_of_space(kept)


@pytest.fixture
def kept(tmp_path) -> Iterator[Checkpoints]:
    """A folder with the checkpoint of step 4, which is still there after a save that fails."""
    store = checkpoints(tmp_path)
    save(store, 4)
    yield store
    assert names(store) == ["step-4"]
    assert store.to_resume() == store.folder / "step-4"


def test_torch_that_cannot_write_gives_the_systems_own_reason(kept, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # EFBIG, as a full quota would be
    try:
        fails_for_lack_of_space(kept)
        with pytest.raises(OSError, match="File too large"):
            write_tensors(tmp_path / "x.pt", {"weight": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
