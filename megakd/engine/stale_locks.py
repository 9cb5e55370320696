"""Clean-up of the locks that torch takes while it loads a compiled extension.

Every later start would wait silently for the lock of a rank that was killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)


def remove_dead_locks(folder: Path) -> list[Path]:
    """Remove and return build locks that no process of this host holds open; log each of them."""
    dead = _remove_unused(sorted(folder.glob("**/lock")))
    for lock in dead:
        logger.warning("removed the lock %s of a process that was killed", lock)
    return dead


def _remove_unused(paths: Sequence[Path]) -> list[Path]:
    """Remove files that no process has open.

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
            yield from (file.path for file in process.open_files())
        except (psutil.Error, OSError):
            continue  # the process has ended, or belongs to another user and has no file of ours
