import mmap
import os

import pytest

from megakd.engine.leftovers import (
    check_shared_memory,
    release_own_buffer,
    remove_dead_buffers,
    remove_dead_locks,
)
from megakd.errors import MegakdError


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
    assert f"removed {lock}" in caplog.text


def test_a_lock_that_a_process_holds_open_stays(tmp_path):
    lock = tmp_path / "lock"

    with lock.open("w"):
        assert remove_dead_locks(tmp_path) == []

    assert lock.exists()


def test_a_buffer_that_no_process_maps_is_removed(buffer, tmp_path):
    assert remove_dead_buffers(tmp_path) == [buffer]
    assert not buffer.exists()


def test_a_buffer_that_a_process_maps_stays(buffer, tmp_path):
    with buffer.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert remove_dead_buffers(tmp_path) == []

    assert buffer.exists()


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

    with pytest.raises(MegakdError, match=r"MB free and 1000000000 CPU ranks need .* --shm-size"):
        check_shared_memory(ranks, tmp_path)


def test_a_system_without_that_folder_is_left_alone(tmp_path):
    check_shared_memory(10**9, tmp_path / "nowhere")
