"""Clean-up of locks and shared memory that killed ranks leave behind.

Two things remain after a killed rank. The first is the lock that torch takes while it loads a
compiled extension; every later start would wait for the lock silently. The second is DeepSpeed's
shared memory of 69 MB per rank in /dev/shm, which remains even after a rank that ends normally.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from megakd.errors import MegakdError

logger = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the system's name for it, no file of ours
BYTES_PER_RANK = 70_000_000


def remove_dead_locks(folder: Path) -> list[Path]:
    """Remove and return build locks that no process of this host holds open; log each of them."""
    dead = _remove_unused(sorted(folder.glob("**/lock")))
    for lock in dead:
        logger.warning("removed the lock %s of a process that was killed", lock)
    return dead


def remove_dead_buffers(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Remove and return this user's DeepSpeed buffers that no process of this host uses."""
    return _remove_unused(sorted(folder.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")))


def _remove_unused(paths: Sequence[Path]) -> list[Path]:
    """Remove files that no process has open or mapped.

    A file that is in use is not touched: its owner would fail if it did not find the file. A file
    that was found unused is renamed, so that no process can open it any more. Then the processes
    are inspected again, because one may have opened the file in the meantime.
    """
    versions = {path: version for path in paths if (version := _version(path)) is not None}
    moved = {
        path: aside
        for path in _unused(list(versions))
        if (aside := _move_aside(path, versions[path])) is not None
    }
    unused = _unused(list(moved.values()))
    for path, aside in moved.items():
        if aside not in unused:
            # A process has it open. A file of another process is never replaced.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(aside)
        aside.unlink(missing_ok=True)
    return [path for path, aside in moved.items() if aside in unused]


def _unused(paths: Sequence[Path]) -> list[Path]:
    used = set(_files_in_use()) if paths else set[str]()
    return [path for path in paths if str(path.resolve()) not in used]


def _version(path: Path) -> tuple[int, int] | None:
    """Return a value that differs if a file was removed and created again; None without file."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return facts.st_ino, facts.st_ctime_ns


def _move_aside(path: Path, version: tuple[int, int]) -> Path | None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.unused")
    if _version(path) != version:
        return None
    try:
        return path.rename(aside)
    except FileNotFoundError:
        return None


def _files_in_use() -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            # In this order, because DeepSpeed first opens a buffer and then maps it.
            yield from (file.path for file in process.open_files())
            yield from (mapping.path for mapping in process.memory_maps())
        except (psutil.Error, OSError):
            continue  # the process has ended, or belongs to another user and has no file of ours


def check_shared_memory(ranks: int, folder: Path = SHARED_MEMORY) -> None:
    """Check that the buffers of CPU ranks fit; otherwise the ranks would die with a bus error."""
    if not folder.is_dir():
        return
    free, needed = shutil.disk_usage(folder).free, ranks * BYTES_PER_RANK
    if free < needed:
        raise MegakdError(
            f"{folder} has {free / 1e6:.0f} MB free, and {ranks} CPU ranks need {needed / 1e6:.0f} "
            "MB; increase its size (in Docker: --shm-size=1g)"
        )


def release_own_buffer(folder: Path = SHARED_MEMORY) -> None:
    """Unlink this rank's buffer; call this after every rank has mapped the buffer.

    The memory is freed when the last rank ends, even if the rank is killed.
    """
    address, port, rank = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    (folder / name).unlink(missing_ok=True)
