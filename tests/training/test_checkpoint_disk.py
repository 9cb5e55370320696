"""A save that is killed or finds no space leaves a whole checkpoint behind."""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_store import ALONE, SHARD, checkpoints, flip, load, names, save

from megakd.errors import CheckpointError
from megakd.storage.atomic import write_tensors, write_text
from megakd.training import checkpoint as checkpoint_module
from megakd.training.checkpoint import Checkpoints


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
        flip(save_unlisted(store, 8) / SHARD)
        try:
            with killed_at(call, monkeypatch):
                save(store, 8)
        except Killed:
            good = store.newest_good()
            assert good is not None
            survived.append(good.name)
            assert load(store, good)["step"] == int(good.name.removeprefix("step-"))
            assert save(store, 8) == store.newest_good()
            assert names(store)[:2] == ["latest", "step-8"]
            assert store.damage(store.folder / "step-8.unused-1") is not None
        else:
            break

    assert survived == sorted(survived)
    assert set(survived) == {"step-4", "step-8"}


def save_unlisted(store: Checkpoints, step: int) -> Path:
    """A checkpoint that `latest` does not name yet."""
    latest = (store.folder / "latest").read_text()
    wide = Checkpoints(folder=store.folder, fingerprint=store.fingerprint, keep=None, ranks=ALONE)
    written = save(wide, step)
    write_text(store.folder / "latest", latest)
    return written


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def store(tmp_path) -> Iterator[Checkpoints]:
    """A folder with the checkpoint of step 4, which is still there after a save that fails."""
    store = checkpoints(tmp_path)
    save(store, 4)
    yield store
    assert names(store) == ["latest", "step-4"]
    assert store.newest_good() == store.folder / "step-4"


def refuses_for_lack_of_space(store: Checkpoints) -> Any:
    return pytest.raises(
        CheckpointError,
        match=rf"^the checkpoint of step 8 could not be written to {store.folder}: "
        r"(No space left on device|File too large); nothing else was changed, the last good "
        rf"checkpoint is {store.folder}/step-4; free some space and start the same command again$",
    )


def test_a_disk_that_is_full_or_fills_up_under_the_engine_destroys_nothing(store, monkeypatch):
    store.begin(8)
    with refuses_for_lack_of_space(store):
        store.publish(8, full_disk)
    usage = shutil._ntuple_diskusage(10, 9, 1)  # pyright: ignore[reportAttributeAccessIssue]
    with monkeypatch.context() as patch, refuses_for_lack_of_space(store):
        patch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: usage)
        save(store, 8)


@pytest.mark.parametrize("owner", [os, checkpoint_module.Path])
def test_a_disk_that_fills_up_at_the_end_of_a_save_destroys_nothing(store, monkeypatch, owner):
    with monkeypatch.context() as patch, refuses_for_lack_of_space(store):
        patch.setattr(owner, "fsync" if owner is os else "rename", full_disk)
        save(store, 8)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system's own refusal to write: EFBIG, as a full quota would be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_torch_that_cannot_write_gives_the_systems_own_reason(store, tmp_path):
    with largest_file(3000), refuses_for_lack_of_space(store):
        save(store, 8)

    with largest_file(3000), pytest.raises(OSError, match="File too large"):
        write_tensors(tmp_path / "x.pt", {"weight": torch.zeros(1000)})


def test_another_failure_is_reported_as_what_it_is(tmp_path):
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "shard.pt")

    message = r"Permission denied.*there is no earlier checkpoint; start"
    store = checkpoints(tmp_path)
    store.begin(8)
    with pytest.raises(CheckpointError, match=message):
        store.publish(8, refused)


def test_what_a_killed_save_left_goes_with_the_next_one(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    store = checkpoints(tmp_path)
    save(store, 4)
    left = store.folder / "step-8.partial"
    left.mkdir()
    (left / SHARD).write_bytes(b"half")

    assert store.newest_good() == store.folder / "step-4"
    save(store, 12)

    assert names(store) == ["latest", "step-12", "step-4"]
