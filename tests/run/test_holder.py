"""One run at a time in an output folder: who holds it, and when it is taken over."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megakd.errors import InUseError
from megakd.run import holder
from megakd.run.holder import LOCK, FolderLock, Holder, read_holder, this_process


@pytest.fixture
def lock(tmp_path) -> Iterator[FolderLock]:
    """A lock for the test to take, which is released after the test."""
    lock = FolderLock(tmp_path)
    yield lock
    lock.release()


@pytest.fixture
def dead() -> Holder:
    """A holder of this host whose process has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return dataclasses.replace(this_process(), pid=process.pid)


@pytest.fixture
def stranger(dead) -> Holder:
    """A holder whose process no one on this host can see."""
    return dataclasses.replace(dead, host="node-7", place="node-7 another-boot")


def leave_lock(folder: Path, left: Holder) -> Path:
    path = folder / LOCK
    path.write_text(json.dumps(dataclasses.asdict(left)), encoding="utf-8")
    return path


class Clock:
    """Time that passes only where somebody waits for it."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.now, self.meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


def pass_time(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> Clock:
    clock = Clock(meanwhile)
    # `this_process` needs the real one: it is asked before.
    monkeypatch.setattr(holder.time, "sleep", clock.sleep)
    monkeypatch.setattr(holder.time, "monotonic", clock.monotonic)
    return clock


def test_a_link_that_network_storage_makes_twice_does_not_lock_the_run_out(tmp_path, monkeypatch):
    link = os.link

    def repeated(*names: Path) -> None:
        link(*names)
        link(*names)

    monkeypatch.setattr(holder.os, "link", repeated)
    lock = FolderLock(tmp_path)
    lock.take()

    with pytest.raises(InUseError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path).take()

    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [[], ["config.yaml"]], ids=["nothing", "a file"])
def test_the_lock_names_its_holder_and_goes_with_it_and_with_an_empty_folder(tmp_path, left):
    out = tmp_path / "out"
    lock = FolderLock(out)

    lock.take()
    shown = read_holder(out / LOCK)
    for name in left:
        (out / name).touch()
    lock.release()

    assert shown == lock.holder
    assert shown.pid == os.getpid()
    assert [path.name for path in out.iterdir()] == left if left else not out.exists()


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_the_lock_of_a_dead_process_is_taken_over_at_once(
    tmp_path, lock, dead, monkeypatch, *, links
):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    leave_lock(tmp_path, dead)
    pass_time(monkeypatch, lambda: pytest.fail("waited"))
    if not links:
        monkeypatch.setattr(os, "link", refuse)

    lock.take()

    assert read_holder(tmp_path / LOCK) == lock.holder
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    with pytest.raises(InUseError):
        FolderLock(tmp_path).take()


@pytest.mark.parametrize("is_half", [False, True], ids=["a later process", "half a lock"])
def test_a_lock_without_a_living_holder_is_taken_over(tmp_path, lock, monkeypatch, is_half):
    path = leave_lock(tmp_path, dataclasses.replace(this_process(), start="before"))
    if is_half:
        path.write_text('{"host": "no')
    pass_time(monkeypatch, lambda: None)

    lock.take()

    assert read_holder(path) == lock.holder


def test_a_zombie_does_not_hold_a_folder(tmp_path, lock):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = dataclasses.replace(
        this_process(), pid=process.pid, start=holder.process_start(process.pid) or ""
    )
    leave_lock(tmp_path, left)
    with pytest.raises(InUseError):
        FolderLock(tmp_path).take()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    lock.take()

    process.communicate()


def test_a_holder_of_another_host_that_gives_a_sign_is_refused(tmp_path, stranger, monkeypatch):
    path = leave_lock(tmp_path, stranger)
    lock = FolderLock(tmp_path)
    clock = pass_time(monkeypatch, lambda: os.utime(path, (clock.now, clock.now)))

    with pytest.raises(InUseError, match=rf"process {stranger.pid} on node-7, since"):
        lock.take()

    assert read_holder(path) == stranger


def test_a_holder_of_another_host_without_a_sign_is_taken_over(
    tmp_path, lock, stranger, monkeypatch, caplog
):
    path = leave_lock(tmp_path, stranger)
    clock = pass_time(monkeypatch, lambda: None)

    lock.take()

    assert read_holder(path) == lock.holder
    assert clock.now >= holder.DEAD_AFTER_S
    assert f"{path} names process {stranger.pid} on node-7" in caplog.text


class Slow(FolderLock):
    """Finds the holder dead, and is overtaken before it takes over."""

    def __init__(self, folder: Path, meanwhile: Callable[[], None]) -> None:
        super().__init__(folder)
        self._meanwhile: Callable[[], None] | None = meanwhile

    def _create(self, path: Path) -> bool:
        if path.name != LOCK and self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()
        return super()._create(path)


def test_of_two_runs_that_find_the_same_holder_dead_the_later_one_is_refused(tmp_path, lock, dead):
    leave_lock(tmp_path, dead)

    with pytest.raises(InUseError):
        Slow(tmp_path, lock.take).take()

    assert read_holder(tmp_path / LOCK) == lock.holder
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_run_that_came_and_went_meanwhile_is_not_in_the_way(tmp_path, dead):
    def come_and_go() -> None:
        quick = FolderLock(tmp_path)
        quick.take()
        quick.release()

    leave_lock(tmp_path, dead)
    slow = Slow(tmp_path, come_and_go)

    slow.take()

    assert read_holder(tmp_path / LOCK) == slow.holder
    slow.release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_whose_lock_another_run_has_taken_is_told(tmp_path, stranger, monkeypatch):
    monkeypatch.setattr(holder, "BEAT_S", 0.01)
    told = threading.Event()
    lock = FolderLock(tmp_path, lost=lambda _: told.set())
    lock.take()

    leave_lock(tmp_path, stranger)

    assert told.wait(60)
    lock.release()
    assert read_holder(tmp_path / LOCK) == stranger


def test_a_lock_that_was_removed_under_a_living_run_is_made_again(tmp_path, lock, monkeypatch):
    monkeypatch.setattr(holder, "BEAT_S", 0.01)
    lock.take()
    made_again = threading.Event()
    monkeypatch.setattr(holder.os, "utime", lambda _: made_again.set())

    (tmp_path / LOCK).unlink()
    made_again.clear()

    assert made_again.wait(60)


def test_a_run_in_a_folder_that_is_held_is_refused_naming_the_other_and_changes_nothing_there(
    one_rank, whole_run, tmp_path, lock
):
    lock.take()

    outcome = one_rank.train("--config", whole_run.config, f"output_dir={tmp_path}", code=2)

    refused = f"megakd: error: {tmp_path} is in use by another run: process {os.getpid()} on "
    assert refused in outcome.err
    assert f"since {lock.holder.since}; wait until that run ends" in outcome.err
    assert f"remove {tmp_path / LOCK}" in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_folder_that_another_export_is_writing_is_left_to_it(one_rank, whole_run, tmp_path):
    lock = FolderLock(tmp_path / ".made.lock")
    lock.take()

    refused = one_rank.megakd("export", whole_run.config, "--to", tmp_path / "made", code=2)

    assert f"is in use by another run: process {os.getpid()}" in refused.err
    lock.release()
    one_rank.megakd("export", whole_run.config, "--to", tmp_path / "made", code=0)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
