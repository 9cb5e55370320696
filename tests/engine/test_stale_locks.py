import mmap
import os
import subprocess
import sys

import psutil
import pytest
from torch.utils.file_baton import FileBaton

from megakd.engine import stale_locks
from megakd.engine.stale_locks import (
    check_shared_memory,
    release_own_buffer,
    remove_dead_buffers,
    remove_dead_locks,
)
from megakd.errors import MegakdError


@pytest.fixture(autouse=True)
def _few_processes(monkeypatch):
    """Look at the processes of this test alone; a busy host has hundreds of others."""
    own = psutil.Process()
    monkeypatch.setattr(psutil, "process_iter", lambda: [own, *own.children()])


@pytest.fixture
def buffer(tmp_path):
    path = tmp_path / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500_0"
    path.write_bytes(bytes(4096))
    return path


def test_a_lock_that_nobody_holds_open_is_removed(tmp_path, caplog):
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()

    assert remove_dead_locks(tmp_path) == [lock]
    assert not lock.exists()
    assert f"removed the lock {lock}" in caplog.text


def test_a_lock_that_a_process_holds_open_stays(tmp_path):
    lock = tmp_path / "lock"

    with lock.open("w"):
        assert remove_dead_locks(tmp_path) == []

    assert lock.exists()


def test_a_buffer_is_removed_unless_a_process_maps_it_or_has_it_open(buffer, tmp_path):
    with buffer.open("r+b"):  # a start has created it and not yet mapped it
        assert remove_dead_buffers(tmp_path) == []
    with buffer.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    with mapped:
        assert remove_dead_buffers(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [buffer.name]

    assert remove_dead_buffers(tmp_path) == [buffer]
    assert not buffer.exists()


def test_a_buffer_that_another_process_holds_open_stays(buffer, tmp_path):
    program = "import sys; file = open(sys.argv[1], 'r+b'); print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program, str(buffer)], stdin=pipe, stdout=pipe
    ) as other:
        other.stdout.readline()

        assert remove_dead_buffers(tmp_path) == []
        assert buffer.exists()
        other.communicate(b"\n")

    assert remove_dead_buffers(tmp_path) == [buffer]


def test_a_buffer_that_a_start_opens_while_another_looks_stays(buffer, tmp_path, monkeypatch):
    opened = []
    move_aside = stale_locks._move_aside

    def open_first(path, version):
        opened.append(path.open("r+b"))
        return move_aside(path, version)

    monkeypatch.setattr(stale_locks, "_move_aside", open_first)

    assert remove_dead_buffers(tmp_path) == []
    assert buffer.exists()
    opened[0].close()


def test_a_buffer_that_a_start_creates_anew_meanwhile_is_not_touched(buffer, tmp_path, monkeypatch):
    def create_anew():
        buffer.unlink(missing_ok=True)
        buffer.write_bytes(b"new")
        return iter(())

    monkeypatch.setattr(stale_locks, "_files_in_use", create_anew)

    assert remove_dead_buffers(tmp_path) == []
    assert buffer.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == [buffer.name]


def test_a_buffer_that_a_start_creates_under_a_name_just_freed_is_not_touched(
    buffer, tmp_path, monkeypatch
):
    looks = []

    def create_at_second_look():
        looks.append(buffer.exists())
        if len(looks) == 2:
            buffer.write_bytes(b"new")
        return iter(())

    monkeypatch.setattr(stale_locks, "_files_in_use", create_at_second_look)

    assert remove_dead_buffers(tmp_path) == [buffer]
    assert looks == [True, False]
    assert buffer.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == [buffer.name]


@pytest.fixture
def owner(tmp_path):
    """A living run that loads an extension."""
    baton = FileBaton(str(tmp_path / "lock"))
    assert baton.try_acquire()
    return baton


def test_a_run_that_releases_its_lock_during_the_look_is_not_disturbed(
    owner, tmp_path, monkeypatch
):
    files_in_use = stale_locks._files_in_use

    def release_meanwhile():
        found = list(files_in_use())
        owner.release()
        return found

    monkeypatch.setattr(stale_locks, "_files_in_use", release_meanwhile)

    assert remove_dead_locks(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_run_that_starts_during_the_look_is_not_touched(tmp_path, monkeypatch):
    dead, baton = tmp_path / "lock", FileBaton(str(tmp_path / "lock"))
    dead.touch()

    def start_meanwhile():
        if baton.fd is None:
            dead.unlink()
            assert baton.try_acquire()
        return iter(())

    monkeypatch.setattr(stale_locks, "_files_in_use", start_meanwhile)

    assert remove_dead_locks(tmp_path) == []
    baton.release()
    assert list(tmp_path.iterdir()) == []


def test_another_programs_files_stay(tmp_path):
    other = tmp_path / "some_other_buffer"
    other.touch()

    assert remove_dead_buffers(tmp_path) == []
    assert other.exists()


def test_a_rank_takes_its_own_buffer_out_of_the_file_system(buffer, tmp_path, monkeypatch):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "RANK": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)

    release_own_buffer(tmp_path)

    assert not buffer.exists()


def test_too_little_shared_memory_is_refused_before_a_bus_error(tmp_path):
    ranks = 10**9  # more than any disk has room for

    with pytest.raises(MegakdError, match=r"MB free, and 1000000000 CPU ranks need .* --shm-size"):
        check_shared_memory(ranks, tmp_path)


def test_a_system_without_that_folder_is_left_alone(tmp_path):
    check_shared_memory(10**9, tmp_path / "nowhere")
