"""What a start that was killed leaves behind, and how the next one clears it away.

Two things outlive a killed rank: the lock that torch takes while it loads a compiled part, for
which every later start would wait without a word, and DeepSpeed's shared memory of 69 MB a rank,
which even a rank that ends well leaves in /dev/shm.
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
    """Remove build locks that no living process of this host holds open; say which."""
    dead = _remove_unused(sorted(folder.glob("**/lock")))
    for lock in dead:
        logger.warning("removed %s: left by a start that was killed", lock)
    return dead


def remove_dead_buffers(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Remove this user's DeepSpeed buffers that no living process of this host has."""
    return _remove_unused(sorted(folder.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")))


def _remove_unused(paths: Sequence[Path]) -> list[Path]:
    """Remove files that no process has open or maps.

    Another start may open a file while this one looks. Every file is therefore moved aside first,
    where nobody opens it any more, and put back if a process has it by then.
    """
    moved = {path: aside for path in paths if (aside := _move_aside(path)) is not None}
    used = set(_files_in_use()) if moved else set()
    for path, aside in moved.items():
        if str(aside.resolve()) in used:
            _put_back(aside, path)
        aside.unlink(missing_ok=True)
    return [path for path, aside in moved.items() if str(aside.resolve()) not in used]


def _move_aside(path: Path) -> Path | None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.unused")
    try:
        return path.rename(aside)
    except FileNotFoundError:  # another start was quicker
        return None


def _put_back(aside: Path, path: Path) -> None:
    # A hard link, because it never replaces what a start may have made there meanwhile.
    with contextlib.suppress(FileExistsError):
        path.hardlink_to(aside)


def _files_in_use() -> Iterator[str]:
    """Return the files that any process has open or maps."""
    for process in psutil.process_iter():
        try:
            # In this order: DeepSpeed maps a buffer that it has opened.
            yield from (file.path for file in process.open_files())
            yield from (mapping.path for mapping in process.memory_maps())
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or another user's: it cannot have a file of ours


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
