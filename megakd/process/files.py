"""Files and folders that are written whole or not at all.

Both are written beside their place, synced and renamed. To replace a folder takes two renames: if
the run is killed between them, the next `replaced_folder` puts the old folder back first.

It is read without torch, so that a command that names something else ends at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megakd.errors import (
    ConfigError,
    MegakdError,
)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; if writing fails, the old file is unchanged."""
    temporary = sibling(path, "new")
    with reports_full_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, tree: object) -> None:
    """Write `tree` as indented JSON with `write_text`; see `json_text`."""
    write_text(path, json_text(tree, indent=2) + "\n")


def json_text(tree: object, *, indent: int | None = None) -> str:
    """Return strict JSON; a number that is not finite becomes null, as JSON cannot express it."""
    return json.dumps(_finite(tree), indent=indent, ensure_ascii=False, allow_nan=False)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `path` when the body succeeds.

    If the body fails, the temporary folder is removed and `path` is unchanged.
    """
    temporary, aside = sibling(path, "new"), sibling(path, "old")
    with reports_full_disk(path):
        _clean_up(path, temporary, aside)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            sync_tree(temporary)
            if path.exists():
                path.replace(aside)
            temporary.replace(path)
        finally:
            _clean_up(path, temporary, aside)
        _sync(path.parent)


def _clean_up(path: Path, temporary: Path, aside: Path) -> None:
    if aside.exists() and not path.exists():  # failed or killed between the two renames
        aside.replace(path)
    for leftover in (temporary, aside):
        if leftover.exists():
            shutil.rmtree(leftover)


def write_content(path: Path, content: str | bytes) -> None:
    """Write a file inside a temporary folder, without a sync or a rename."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def reports_full_disk(path: Path) -> Iterator[None]:
    """Convert all errors of a full disk into one message; other errors are not changed."""
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
    """Return the system's text for a full disk, quota or size limit that caused `error`, or None.

    The chain of causes is searched: torch.save into an open file raises a RuntimeError whose
    context is the OSError. safetensors and shutil.copytree have only the number, in their text.
    """
    for link in chain_of(error):
        named = re.search(r"(?:\(os error |\[Errno )(\d+)[)\]]", str(link))
        number = getattr(link, "errno", None) or (int(named[1]) if named else None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return os.strerror(number)
    return None


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of this cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def sibling(path: Path, suffix: str) -> Path:
    """Return the hidden path beside a file or folder for what is made of it or guards it."""
    # The name is fixed, not random, so that the next run finds the files of a killed run.
    return path.with_name(f".{path.name}.{suffix}")


def sync_tree(folder: Path) -> None:
    """Wait until all files below a folder, and their names, are on the disk.

    The files get the folder's permissions: safetensors lets only their owner read them.
    """
    readers = folder.stat().st_mode & 0o666
    for path in [*sorted(folder.rglob("*")), folder]:
        if path.is_file() and path.stat().st_mode & 0o777 != readers:
            path.chmod(readers)
        if path.is_file() or path.is_dir():
            _sync(path)


def _sync(path: Path) -> None:
    # Of a folder too: the files may be on disk, and their names in the folder not.
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


def write_tensors(path: Path, state: Any) -> None:
    """Call `torch.save`, and raise the operating system's own error on failure."""
    import torch

    try:
        # Into an open file: if torch opens the file itself, it hides the system's error.
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        system = (link.args for link in chain_of(error) if isinstance(link, OSError))
        raise OSError(*next(system, (str(error).splitlines()[0],))) from error


def check_writable(folder: Path, *, where: str) -> None:
    """Check that a folder can be written to, or can be created."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there):
            return
    except OSError as error:  # also of a file, and of a file system without new folders
        raise ConfigError(f"{where}: {there} is not a writable folder") from error
