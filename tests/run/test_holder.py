"""One run at a time in an output folder: who holds it, and when it is taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TextIO

import pytest

from megakd.errors import InUseError
from megakd.run.holder import LOCK, check_free, locked


def leave_lock(folder: Path, **facts: object) -> Path:
    """Leave the lock of a process of this host, as a run that was killed does."""
    folder.mkdir(exist_ok=True)
    with locked(folder):
        lock = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**lock, **facts}))
    return folder / LOCK


@pytest.mark.parametrize("left", [[], ["config.yaml"]], ids=["nothing", "a file"])
def test_the_lock_names_its_process_and_goes_with_it_and_with_a_new_empty_folder(tmp_path, left):
    out = tmp_path / "out"

    with locked(out):
        assert json.loads((out / LOCK).read_text())["pid"] == os.getpid()
        for name in left:
            (out / name).touch()
        with pytest.raises(InUseError, match=f"process {os.getpid()}"), locked(out):
            pass
        assert (out / LOCK).exists()

    assert [path.name for path in out.iterdir()] == left if left else not out.exists()


HOLD = """
import sys, pathlib
from megakd.run.holder import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], **pipes)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(InUseError, match=f"process {process.pid} on"):
        check_free(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    check_free(tmp_path)  # a zombie, whose launcher has not asked for its exit code
    process.communicate()

    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(InUseError), locked(tmp_path):
            pass


def test_a_lock_that_its_holder_removes_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """The next start would write another file, and both would run."""
    path, lock = leave_lock(tmp_path), fcntl.flock

    def lock_of_a_file_that_is_gone(file: TextIO, kind: int) -> None:
        path.unlink()
        lock(file, kind)

    monkeypatch.setattr(fcntl, "flock", lock_of_a_file_that_is_gone)
    with pytest.raises(InUseError), locked(tmp_path):
        pass


def test_storage_without_locks_refuses_what_another_run_has_left(tmp_path, monkeypatch):
    def unsupported(file: TextIO, kind: int) -> None:
        raise OSError(errno.ENOSYS, "not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    path = leave_lock(tmp_path)

    with pytest.raises(InUseError, match=f"remove {path}$"), locked(tmp_path):
        pass


def test_a_process_of_another_host_is_refused_with_the_file_to_remove(tmp_path):
    since = "2026-11-21 10:02:11 UTC"
    path = leave_lock(tmp_path, pid=4711, host="node-7", since=since)

    message = rf"process 4711 on node-7, since {since}; wait .*remove {path}$"
    with pytest.raises(InUseError, match=message), locked(tmp_path):
        pass

    path.unlink()
    with locked(tmp_path):
        pass


def test_half_a_lock_is_refused_with_the_file_to_remove(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "no')

    with pytest.raises(InUseError, match=f"an unknown host.* remove {tmp_path / LOCK}"):
        check_free(tmp_path)


def test_a_folder_that_another_export_is_writing_is_left_to_it(one_rank, whole_run, tmp_path):
    words = ("export", whole_run.config, "--to", tmp_path / "copy")

    with locked(tmp_path / ".copy.lock"):
        refused = one_rank.megakd(*words, code=2)

    assert f"is in use by another run: process {os.getpid()}" in refused.err
    one_rank.megakd(*words, code=0)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
