"""What a start that was killed leaves behind, and how the next one clears it away.

Two things outlive a killed rank: the lock that torch takes while it loads a compiled part, for
which every later start would wait without a word, and DeepSpeed's shared memory of 69 MB a rank,
which even a rank that ends well leaves in /dev/shm.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from megakd.errors import MegakdError

logger = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the system's name for it, no file of ours
BYTES_PER_RANK = 70_000_000


def remove_dead_locks(folder: Path) -> list[Path]:
    """Removes build locks that no living process of this host holds open; says which."""
    dead = [lock for lock in sorted(folder.glob("**/lock")) if not _is_open(lock)]
    for lock in dead:
        lock.unlink(missing_ok=True)
        logger.warning("removed %s: left by a start that was killed", lock)
    return dead


def _is_open(path: Path) -> bool:
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == path.resolve() for file in process.open_files()):
                return True
        except psutil.Error:
            continue  # gone meanwhile, or another user's: it cannot hold a lock of ours
    return False


def remove_dead_buffers(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Removes this user's DeepSpeed buffers that no living process of this host maps."""
    found = sorted(folder.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"))
    mapped = set(_mapped_files()) if found else set()
    dead = [buffer for buffer in found if str(buffer) not in mapped]
    for buffer in dead:
        buffer.unlink(missing_ok=True)
    return dead


def _mapped_files() -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            yield from (mapping.path for mapping in process.memory_maps())
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or another user's


def check_shared_memory(ranks: int, folder: Path = SHARED_MEMORY) -> None:
    """Refuses to start CPU ranks where their buffers do not fit: they would die by a bus error.

    Raises:
        MegakdError: names what is needed and what there is.
    """
    if not folder.is_dir():
        return
    free, needed = shutil.disk_usage(folder).free, ranks * BYTES_PER_RANK
    if free < needed:
        raise MegakdError(
            f"{folder} has {free / 1e6:.0f} MB free and {ranks} CPU ranks need "
            f"{needed / 1e6:.0f} MB of it; enlarge it (in Docker: --shm-size=1g)"
        )


def release_own_buffer(folder: Path = SHARED_MEMORY) -> None:
    """Takes this rank's buffer out of the file system once every rank has mapped it.

    The memory stays until the last rank ends, however it ends.
    """
    address, port, rank = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    (folder / name).unlink(missing_ok=True)
