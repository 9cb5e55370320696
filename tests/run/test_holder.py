"""One run at a time in an output folder: who holds it, and when it is taken over."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megakd.errors import InUseError
from megakd.run import holder
from megakd.run.holder import LOCK, check_free, written_once


def leave_lock(folder: Path, pid: int, **facts: object) -> Path:
    """Leave the lock of a process of this host, as a run that was killed does."""
    with written_once(folder):
        lock = json.loads((folder / LOCK).read_text())
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps({**lock, "pid": pid, **facts}))
    return folder / LOCK


@pytest.mark.parametrize("left", [[], ["config.yaml"]], ids=["nothing", "a file"])
def test_the_lock_names_its_process_and_goes_with_it_and_with_a_new_empty_folder(tmp_path, left):
    out = tmp_path / "out"

    with written_once(out):
        assert json.loads((out / LOCK).read_text())["pid"] == os.getpid()
        for name in left:
            (out / name).touch()
        with pytest.raises(InUseError, match=f"process {os.getpid()}"), written_once(out):
            pass
        assert (out / LOCK).exists()

    assert [path.name for path in out.iterdir()] == left if left else not out.exists()


def test_the_lock_of_a_process_that_has_ended_is_taken_over(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    leave_lock(tmp_path, process.pid, start=start)
    with pytest.raises(InUseError, match=f"process {process.pid} on"):
        check_free(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    check_free(tmp_path)  # a zombie, whose launcher has not asked for its exit code
    process.communicate()

    with written_once(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_of_two_starts_one_alone_takes_over_a_dead_lock(tmp_path, monkeypatch):
    leave_lock(tmp_path, os.getpid(), start="before")

    def check_while_another_start_tries(folder: Path) -> None:
        check_free(folder)
        descriptor = os.open(folder, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # it waits until the lock is that of this process
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)

    monkeypatch.setattr(holder, "check_free", check_while_another_start_tries)
    with written_once(tmp_path):
        monkeypatch.undo()
        with pytest.raises(InUseError), written_once(tmp_path):
            pass


def test_a_pod_that_is_started_again_takes_over_from_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    leave_lock(tmp_path, 17, start="before")

    check_free(tmp_path)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    with pytest.raises(InUseError):  # it may be another container
        check_free(tmp_path)


def test_a_process_of_another_host_is_refused_with_the_file_to_remove(tmp_path):
    since = "2026-11-21 10:02:11 UTC"
    path = leave_lock(tmp_path, 4711, host="node-7", place="node-7", since=since)

    message = rf"process 4711 on node-7, since {since}; wait .*remove {path}$"
    with pytest.raises(InUseError, match=message), written_once(tmp_path):
        pass

    path.unlink()
    with written_once(tmp_path):
        pass


def test_half_a_lock_is_refused_with_the_file_to_remove(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "no')

    with pytest.raises(InUseError, match=f"an unknown host.* remove {tmp_path / LOCK}"):
        check_free(tmp_path)


def test_a_folder_that_another_export_is_writing_is_left_to_it(one_rank, whole_run, tmp_path):
    words = ("export", whole_run.config, "--to", tmp_path / "copy")

    with written_once(tmp_path / ".copy.lock"):
        refused = one_rank.megakd(*words, code=2)

    assert f"is in use by another run: process {os.getpid()}" in refused.err
    one_rank.megakd(*words, code=0)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
