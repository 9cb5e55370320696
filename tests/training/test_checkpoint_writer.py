"""Checkpoints that are written beside the next steps, and saves that fail or are killed."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_store import SHARD, checkpoints, load, names, save, states_of

from megakd.errors import CheckpointError
from megakd.storage.atomic import write_tensors
from megakd.training import checkpoint
from megakd.training.checkpoint import Checkpoints


@pytest.fixture
def store(tmp_path) -> Checkpoints:
    return checkpoints(tmp_path)


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
    folder = store.to_resume(resume=True)
    store.load(folder, lambda _: None, states_of(values))
    return torch.load(folder / SHARD)["weight"][0].item(), values["strategy"]


def test_a_checkpoint_has_the_values_of_its_step_and_no_name_while_it_is_written(store, held):
    training = Training(store)
    training.step()
    training.save(1)
    training.step()

    assert (training.writer.is_pending, training.writer.is_writing) == (True, True)
    assert names(store) == ["step-1.partial"]
    assert store.to_resume(resume=True) is None
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
            good = store.to_resume(resume=True)
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
    assert store.to_resume(resume=True) == store.folder / "step-4"


def test_torch_that_cannot_write_gives_the_systems_own_reason(kept, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # EFBIG, as a full quota would be
    try:
        fails_for_lack_of_space(kept)
        with pytest.raises(OSError, match="File too large"):
            write_tensors(tmp_path / "x.pt", {"weight": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
