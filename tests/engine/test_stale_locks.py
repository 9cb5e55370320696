import subprocess
import sys

import psutil
import pytest
from torch.utils.file_baton import FileBaton

from megakd.engine import distributed
from megakd.engine.distributed import remove_dead_locks


@pytest.fixture(autouse=True)
def _few_processes(monkeypatch):
    """Look at the processes of this test alone; a busy host has hundreds of others."""
    this = psutil.Process()
    monkeypatch.setattr(psutil, "process_iter", lambda: [this, *this.children()])


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_lock_that_nobody_holds_open_is_removed(lock, tmp_path, caplog):
    assert remove_dead_locks(tmp_path) == [lock]
    assert not lock.exists()
    assert f"removed the lock {lock}" in caplog.text


def test_a_lock_that_another_process_holds_open_stays(lock, tmp_path):
    program = "import sys; file = open(sys.argv[1], 'r+b'); print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=pipe, stdout=pipe
    ) as other:
        other.stdout.readline()

        assert remove_dead_locks(tmp_path) == []
        assert lock.exists()
        other.communicate(b"\n")

    assert remove_dead_locks(tmp_path) == [lock]


def test_a_lock_that_a_start_opens_while_another_looks_stays(lock, tmp_path, monkeypatch):
    opened = []
    move_aside = distributed._move_aside

    def open_first(path, version):
        opened.append(path.open("r+b"))
        return move_aside(path, version)

    monkeypatch.setattr(distributed, "_move_aside", open_first)

    assert remove_dead_locks(tmp_path) == []
    assert lock.exists()
    opened[0].close()


def test_a_lock_that_a_start_creates_under_a_name_just_freed_is_not_touched(
    lock, tmp_path, monkeypatch
):
    looks = []

    def create_at_second_look():
        looks.append(lock.exists())
        if len(looks) == 2:
            lock.write_text("new")
        return iter(())

    monkeypatch.setattr(distributed, "_files_in_use", create_at_second_look)

    assert remove_dead_locks(tmp_path) == [lock]
    assert looks == [True, False]
    assert lock.read_text() == "new"
    assert [path.name for path in lock.parent.iterdir()] == [lock.name]


@pytest.fixture
def owner(tmp_path):
    """A living run that loads an extension."""
    baton = FileBaton(str(tmp_path / "lock"))
    assert baton.try_acquire()
    return baton


def test_a_run_that_releases_its_lock_during_the_look_is_not_disturbed(
    owner, tmp_path, monkeypatch
):
    files_in_use = distributed._files_in_use

    def release_meanwhile():
        result = list(files_in_use())
        owner.release()
        return result

    monkeypatch.setattr(distributed, "_files_in_use", release_meanwhile)

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

    monkeypatch.setattr(distributed, "_files_in_use", start_meanwhile)

    assert remove_dead_locks(tmp_path) == []
    baton.release()
    assert list(tmp_path.iterdir()) == []
