"""Folders that are there whole or not at all, however many processes make them at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megakd.errors import DataError

MANIFEST = "manifest.json"
# Reading every byte of a cache at each start costs about a second per GiB and rank; beyond
# this much the lengths alone are compared.
CHECKED_BYTES = 1 << 30
_BLOCK = 1 << 22


def whole_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Reuses the folder if it is whole, else builds it beside and renames it into place.

    Several processes may build at once: whoever renames first wins, and the others use what
    it wrote. A damaged folder is moved away, never changed in place, so that a process that
    has it memory-mapped keeps reading what it opened.

    Args:
        folder: where the result lies; its name should be a content key.
        build: fills the (existing, empty) folder that it is given.

    Raises:
        DataError: the folder cannot be written.
    """
    if is_whole(folder):
        return folder
    with _writable(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
        # One deeper, since a temporary folder is closed to other users and would stay so.
        draft = scratch / "draft"
        try:
            draft.mkdir()
            build(draft)
            _write_manifest(draft)
            _put_in_place(draft, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file that the manifest lists is there with its length and checksum."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        check_bytes = sum(entry["bytes"] for entry in manifest.values()) <= CHECKED_BYTES
        return all(
            (folder / name).stat().st_size == entry["bytes"]
            and (not check_bytes or _checksum(folder / name) == entry["crc32"])
            for name, entry in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turns a failure to write below `folder` into a message."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write prepared data to {folder}: {reason}. Free space there or make the "
            f"folder writable; nothing half-written was kept"
        ) from error


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "crc32": _checksum(path),
        }
        for path in files
    }
    for path in files:
        _sync(path)
    listing = folder / MANIFEST
    listing.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(listing)


def _put_in_place(draft: Path, folder: Path) -> None:
    """Renames the draft; a whole folder of someone else wins, a damaged one makes room."""
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
        # Another builder was at the same point and came first.
        if not is_whole(folder):
            raise
    finally:
        shutil.rmtree(damaged, ignore_errors=True)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
