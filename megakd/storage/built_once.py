"""Folders that exist whole or not at all, even if several processes build them at once."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megakd.errors import DataError
from megakd.storage.atomic import sync_tree
from megakd.storage.checksums import Entries, damage_of
from megakd.storage.finished_folder import entries, seal

# Reading every byte of a cache at each start costs about a second per GiB and rank; in larger
# folders only the lengths of the files are compared.
CHECKED_BYTES = 1 << 30


def whole_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Reuse the folder if it is whole; otherwise build a temporary folder and rename it.

    Several processes may build at once: the first process to rename wins, and the others use its
    result. A damaged folder is moved away and never changed in place, so that a process that has
    its files memory-mapped keeps reading the same content.

    Args:
        folder: the folder of the result; its name should be a content key.
        build: function that fills an existing, empty folder.

    Raises:
        DataError: the folder cannot be written.
    """
    if is_whole(folder):
        return folder
    with _writable(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
        # A subfolder, because `mkdtemp` makes a folder that other users cannot read.
        draft = scratch / "draft"
        try:
            draft.mkdir()
            build(draft)
            seal(draft)
            sync_tree(draft)
            _put_in_place(draft, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether every file has the size and, up to 1 GiB in all, the checksum as written."""
    try:
        return damage_at_start(folder, entries(folder)) is None
    except (OSError, ValueError):
        return False


def damage_at_start(folder: Path, listed: Entries) -> str | None:
    """Return what is wrong with a cache; files above 1 GiB in all are not read."""
    size = sum(entry["size"] for entry in listed.values())
    return damage_of(folder, listed, reads=size <= CHECKED_BYTES)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write prepared data to {folder}: {reason}. Free space there or make the "
            "folder writable; no partial files were kept"
        ) from error


def _put_in_place(draft: Path, folder: Path) -> None:
    """Rename the draft to `folder`; keep a whole folder that exists, replace a damaged one."""
    try:
        draft.rename(folder)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
    else:
        return
    if is_whole(folder):
        return
    damaged = Path(tempfile.mkdtemp(prefix=".damaged.", dir=folder.parent))
    try:
        folder.rename(damaged / folder.name)
        draft.rename(folder)
    except OSError:
        # Another process has replaced the damaged folder first.
        if not is_whole(folder):
            raise
    finally:
        shutil.rmtree(damaged, ignore_errors=True)
