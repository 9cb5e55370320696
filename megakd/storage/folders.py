"""Finished folders: whole or not at all, with one manifest of the size and SHA-256 of every file.

The manifest, `checksums.json`, is written last. `open_finished` (for a folder of a run) and
`check_given` (for a folder that a user names) compare the files with it before any is used.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megakd.errors import CheckpointError, ConfigError, DataError, ModelError
from megakd.storage import atomic
from megakd.storage.atomic import sync_tree
from megakd.storage.checksums import Entries, damage_of, entries_of, files_of

CHECKSUMS = "checksums.json"
CARD = "README.md"
"""The model card, which users edit."""
# Reading every byte of a cache at each start costs about a second per GiB and rank; in larger
# folders only the lengths of the files are compared.
CHECKED_BYTES = 1 << 30


@contextmanager
def sealed_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `path` and gets a manifest of its files."""
    with atomic.replaced_folder(path) as temporary:
        yield temporary
        seal(temporary)


def seal(folder: Path) -> None:
    """Write the manifest of a new folder."""
    write_manifest(folder, entries_of(folder, files_of(folder)))


def write_manifest(folder: Path, files: Entries) -> None:
    """Write the manifest of a new folder whose entries are known."""
    atomic.write_json(folder / CHECKSUMS, {"files": files})


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
    add: Callable[[Path], object] | None = None,
) -> None:
    """Verify a finished folder and make `target` a finished folder with the same files.

    Args:
        changes: file name -> content of the file in the copy, or None to leave the file out.
        add: called with the new folder, to write files that belong to the folder.
    """
    listed = open_finished(source, remedy=remedy)
    with sealed_folder(target) as temporary:
        for name in listed.keys() - changes.keys():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, temporary / name)
        for name, content in changes.items():
            if content is not None:
                atomic.write_content(temporary / name, content)
        if add is not None:
            add(temporary)


def open_finished(folder: Path, *, remedy: str) -> Entries:
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
    return damage_of(folder, {n: e for n, e in listed.items() if n != CARD and wanted(n)})


def users_files(folder: Path) -> list[str]:
    """Return the files of a folder that are not as megakd wrote them."""
    try:
        listed = entries(folder)
    except (OSError, ValueError):
        listed = {}
    names = [name for name in files_of(folder) if name != CHECKSUMS]
    return [n for n in names if n not in listed or damage_of(folder, {n: listed[n]})]


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and the checksum of every file that megakd wrote into a folder.

    Raises:
        OSError: the manifest is missing.
        ValueError: the manifest is damaged.
    """
    try:
        files = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        return {name: {"size": e["size"], "sha256": e["sha256"]} for name, e in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it lists no files: {error!r}") from error


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
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name[:16]}.", dir=folder.parent
        ) as scratch:
            # A subfolder, because a temporary folder cannot be read by other users.
            draft = Path(scratch) / "draft"
            draft.mkdir()
            build(draft)
            seal(draft)
            sync_tree(draft)
            try:
                if folder.exists() and not is_whole(folder):
                    folder.rename(draft.with_name("damaged"))
                draft.rename(folder)
            except OSError:  # another process was faster
                if not is_whole(folder):
                    raise
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


def check_writable(folder: Path, *, where: str) -> None:
    """Check that a folder can be written to, or can be created."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(f"{where}: {there} is not a writable folder")
