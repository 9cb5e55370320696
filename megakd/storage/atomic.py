"""Files and folders that are written whole or not at all, whenever the run is killed.

A file goes to a temporary sibling that is synced and renamed. A folder takes two renames, so a
kill between them leaves only the old folder under its aside name: `recover` puts it back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from megakd.errors import MegakdError

if TYPE_CHECKING:
    from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file, or leaves what was there.

    Raises:
        MegakdError: the disk is full.
    """
    temporary = _sibling(path, "new")
    with reports_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, tree: object) -> None:
    """Writes `tree` as indented JSON, or leaves what was there; see `json_text`."""
    write_text(path, json_text(tree, indent=2) + "\n")


def json_text(tree: object, *, indent: int | None = None) -> str:
    """Strict JSON: a number that is not finite becomes null, for JSON has no word for it."""
    return json.dumps(_finite(tree), indent=indent, ensure_ascii=False, allow_nan=False)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Gives an empty temporary folder that takes the place of `path` when the body succeeds.

    When the body fails the temporary folder is removed and `path` is as it was.

    Raises:
        MegakdError: the disk is full.
    """
    temporary, aside = _sibling(path, "new"), _sibling(path, "old")
    with reports_full_disk(path):
        recover(path)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            _sync_tree(temporary)
            if path.exists():
                path.replace(aside)
            temporary.replace(path)
        finally:
            recover(path)
        _sync_folder(path.parent)


def write_content(path: Path, content: str | bytes) -> None:
    """Writes a file inside a folder that is not yet in its place."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def recover(path: Path) -> bool:
    """Undoes what a killed `replaced_folder(path)` left behind; harmless at any other time.

    Returns:
        True if the old folder had to be put back.
    """
    temporary, aside = _sibling(path, "new"), _sibling(path, "old")
    restored = aside.exists() and not path.exists()
    if restored:
        aside.replace(path)
    for leftover in (temporary, aside):
        _remove(leftover)
    return restored


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def reports_full_disk(path: Path) -> Iterator[None]:
    """Turns the many faces of a full disk into one message; other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = full_disk_reason(error)
        if reason is None:
            raise
        raise MegakdError(
            f"no space left while writing {path} ({reason}); nothing was changed. "
            "Free some space or choose another output_dir, then start the same command again."
        ) from error


def full_disk_reason(error: BaseException) -> str | None:
    """The system's words for a full disk, quota or size limit behind `error`, else None.

    Looks along the chain: torch.save into an open file raises a RuntimeError whose context is
    the OSError; safetensors and shutil.copytree have only the number, in their text.
    """
    link: BaseException | None = error
    while link is not None:
        number = getattr(link, "errno", None) or _error_number(str(link))
        if number in FULL_DISK:
            return os.strerror(number)
        link = link.__cause__ or link.__context__
    return None


def _error_number(text: str) -> int | None:
    found = re.search(r"(?:\(os error |\[Errno )(\d+)[)\]]", text)
    return int(found[1]) if found else None


def _sibling(path: Path, suffix: str) -> Path:
    # The name is fixed, not random, so that the next run finds what a killed one left.
    return path.with_name(f".{path.name}.{suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)
        elif path.is_dir():
            _sync_folder(path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    # Without this the files are on the disk and the names that lead to them may not be.
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(tree: object) -> object:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return tree
