"""Folders that exist whole or not at all, also if several processes build them at once.

A finished folder is a model, its companion files, and checksums of all files that megakd wrote.

`sealed_folder` and `copy_finished` write a finished folder. `open_finished` (for a folder of a
run) and `check_given` (for a folder that a user names) verify a finished folder. All code that
reads a finished folder calls one of these two functions first.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megakd.errors import CheckpointError, ConfigError, DataError, ModelError
from megakd.storage import atomic
from megakd.storage.atomic import sync_tree
from megakd.storage.checksums import (
    damage_of,
    entries_of,
    files_of,
    read_signed,
    write_signed,
)

CHECKSUMS = "checksums.json"
LOCK = "lock.json"
"""Part of the names of the files by which a process holds a folder."""
CARD = "README.md"
"""The model card, which users edit."""
# Reading every byte of a cache at each start costs about a second per GiB and rank; in larger
# folders only the lengths of the files are compared.
CHECKED_BYTES = 1 << 30


@contextmanager
def sealed_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `path` and gets checksums of its files."""
    with atomic.replaced_folder(path) as temporary:
        yield temporary
        seal(temporary)


def seal(folder: Path) -> None:
    """Write the checksums of all files of a new folder."""
    write_signed(folder / CHECKSUMS, {"files": entries_of(folder, files_of(folder))})


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def write_finished(path: Path, files: Mapping[str, str | bytes]) -> None:
    """Write a finished folder of small files."""
    with sealed_folder(path) as temporary:
        for name, content in files.items():
            atomic.write_content(temporary / name, content)


def copy_finished(
    source: Path,
    target: Path,
    *,
    changes: Mapping[str, str | bytes | None],
    remedy: str,
    keep: Sequence[str] = (),
    add: Callable[[Path], object] | None = None,
) -> None:
    """Verify a finished folder and make `target` a finished folder with the same files.

    Args:
        changes: file name -> content of the file in the copy, or None to leave the file out.
        keep: files of the old `target` to copy into the new `target`, without checksums.
        add: called with the new folder, to write files that belong to the folder.
    """
    listed = open_finished(source, remedy=remedy)
    with atomic.replaced_folder(target) as temporary:
        for name in listed.keys() - changes.keys():
            _copy_file(source / name, temporary / name)
        for name, content in changes.items():
            if content is not None:
                atomic.write_content(temporary / name, content)
        if add is not None:
            add(temporary)
            clash = sorted(n for n in {*keep} - changes.keys() if (temporary / n).exists())
            if clash:
                raise CheckpointError(
                    f"{target} holds files that megakd did not write and has to write: "
                    f"{', '.join(clash)}; move these files away and start the same command again"
                )
        seal(temporary)
        for name in keep:
            _copy_file(target / name, temporary / name)


def users_files(folder: Path) -> list[str]:
    """Return the files that a user added to a finished folder, and the card if it was edited."""
    there = set(files_of(folder)) - {CHECKSUMS} if folder.is_dir() else set[str]()
    if not there:
        return []
    remedy = "megakd removes no file that it did not write: move the folder away and start again"
    try:
        listed = entries(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {CHECKSUMS} cannot be read ({error}); {remedy}"
        ) from error
    reason = damage_of(folder, {n: listed[n] for n in there & listed.keys() - {CARD}})
    if reason is not None:
        raise CheckpointError(f"{folder} is damaged: {reason}; {remedy}")
    edited = {n for n in there & {CARD} & listed.keys() if damage_of(folder, {n: listed[n]})}
    return sorted((there - listed.keys()) | edited)


def open_finished(folder: Path, *, remedy: str) -> Mapping[str, Any]:
    """Verify a folder that a run has finished, and return the entries of its files.

    The message about a damaged folder ends with the `remedy`.
    """
    reason = damage(folder)
    if reason is not None:
        raise CheckpointError(f"{folder} is damaged: {reason}; {remedy}")
    return entries(folder)


def check_given(folder: Path, where: str, *, wanted: Callable[[str], bool] = bool) -> None:
    """Verify a folder that a user names, if megakd wrote the folder.

    Files may be missing, for example after a transfer through the Hub; a changed file is refused.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    reason = damage(folder, wanted=lambda name: wanted(name) and (folder / name).exists())
    if reason is not None:
        raise ModelError(
            f"{where}: {folder} is damaged: {reason}; copy the folder again, or remove "
            f"{folder / CHECKSUMS} if the file was changed on purpose"
        )


def damage(folder: Path, *, wanted: Callable[[str], bool] = bool) -> str | None:
    """Return what is wrong with a finished folder, or None; the model card may be edited."""
    try:
        listed = entries(folder)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    counted = {n: entry for n, entry in listed.items() if n != CARD and wanted(n)}
    return damage_of(folder, counted)


def entries(folder: Path) -> Mapping[str, Any]:
    """Return the size and the checksum of every file that megakd wrote into a folder."""
    return read_signed(folder / CHECKSUMS)["files"]


def whole_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """Reuse the folder if it is whole; otherwise build a temporary folder and rename it.

    Several processes may build at once: the first process to rename wins, and the others use its
    result. A damaged folder is moved away and never changed in place, so that a process that has
    its files memory-mapped keeps reading the same content.
    """
    if is_whole(folder):
        return folder
    try:
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
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write prepared data to {folder.parent}: {reason}. Free space there or make "
            "the folder writable; no partial files were kept"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether every file has the size and, up to 1 GiB in all, the checksum as written."""
    try:
        listed = entries(folder)
        size = sum(entry["size"] for entry in listed.values())
        return damage_of(folder, listed, reads=size <= CHECKED_BYTES) is None
    except (OSError, ValueError):
        return False


def _put_in_place(draft: Path, folder: Path) -> None:
    # A whole folder that exists is kept, and a damaged one is replaced.
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


def check_writable(folder: Path, *, where: str) -> None:
    """Check that a folder can be written to, or can be created."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"{where}: {there} is not a writable folder")
