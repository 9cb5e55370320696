"""Finished folders and files, with a checksum of each file in them.

The manifest, `checksums.json`, is written last. `verified_entries` (for a folder of a run) and
`check_given` (for a folder that a user names) compare the files with it before any is used. A
record of JSON may carry a checksum of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megakd.errors import (
    CheckpointError,
    DataError,
    ModelError,
)
from megakd.process.files import (
    json_text,
    replaced_folder,
    sha256_of,
    sync_tree,
    write_content,
    write_json,
    write_tensors,
)

CHECKSUMS = "checksums.json"

CARD = "README.md"
"""The model card, which users edit."""

# Reading every byte of a cache at each start costs about a second per GiB and rank; in larger
# folders only the lengths of the files are compared.
CHECKED_BYTES = 1 << 30


@contextmanager
def sealed_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `path` and gets a manifest of its files."""
    with replaced_folder(path) as temporary:
        yield temporary
        seal(temporary)


def seal(folder: Path) -> None:
    """Write the manifest of a new folder."""
    write_manifest(folder, entries_of(folder, files_of(folder)))


def write_manifest(folder: Path, files: Entries) -> None:
    """Write the manifest of a new folder whose entries are known."""
    write_json(folder / CHECKSUMS, {"files": files})


def write_finished(path: Path, files: Mapping[str, str | bytes]) -> None:
    """Write a finished folder of small files."""
    with sealed_folder(path) as temporary:
        for name, content in files.items():
            write_content(temporary / name, content)


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
    listed = verified_entries(source, remedy=remedy)
    with sealed_folder(target) as temporary:
        for name in listed.keys() - changes.keys():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, temporary / name)
        for name, content in changes.items():
            if content is not None:
                write_content(temporary / name, content)
        if add is not None:
            add(temporary)


def verified_entries(folder: Path, *, remedy: str) -> Entries:
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


def damage(
    folder: Path, *, wanted: Callable[[str], bool] = bool, most_bytes: float = math.inf
) -> str | None:
    """Return what is wrong with a finished folder, or None; the model card may be edited.

    Of more than `most_bytes`, only the sizes of the files are compared.
    """
    try:
        listed = {n: e for n, e in entries(folder).items() if n != CARD and wanted(n)}
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    size = sum(entry["size"] for entry in listed.values())
    return damage_of(folder, listed, reads=size <= most_bytes)


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

    def is_whole() -> bool:
        return damage(folder, most_bytes=CHECKED_BYTES) is None

    if is_whole():
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
                if folder.exists() and not is_whole():
                    folder.rename(draft.with_name("damaged"))
                draft.rename(folder)
            except OSError:  # another process was faster
                if not is_whole():
                    raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"cannot write prepared data to {folder.parent}: {reason}. Free space there or make "
            "the folder writable; no partial files were kept"
        ) from error
    return folder


Entries = Mapping[str, Mapping[str, Any]]
"""Mapping from a relative file name to the file's `size` in bytes and `sha256`."""

_CHECKSUM = "checksum"

_SETTLED_NS = 2_000_000_000

Identity = tuple[int, int, int, int, int]

_KNOWN: dict[Identity, str] = {}


def entries_of(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the entries of some files of a folder."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": _known_sha256(folder / name)}
        for name in names
    }


def write_files(folder: Path, contents: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Write files with `torch.save`, and force them to the disk; return their entries."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_tensors(folder / name, content)
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
    return entries_of(folder, contents)


def files_of(folder: Path) -> list[str]:
    """Return the sorted names of all files below a folder, relative to the folder."""
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def damage_of(folder: Path, entries: Entries, *, reads: bool = True) -> str | None:
    """Return what is wrong with the first damaged file, or None; with `reads`, by its checksum."""
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['size']} were written"
        if reads and _known_sha256(path) != entry["sha256"]:
            return f"the checksum of {name} differs"
    return None


def _known_sha256(path: Path) -> str:
    # Each version of a file is read once per process.
    version = version_of(path)
    if version is None:
        return sha256_of(path)
    if version not in _KNOWN:
        _KNOWN[version] = sha256_of(path)
    return _KNOWN[version]


def version_of(path: Path) -> Identity | None:
    """Return numbers that change with the content of a file; None if they may not change in time.

    Every write sets the time of the last change of the inode, which no program can set back. A file
    that was just written may change again without a change of its times.
    """
    facts = path.stat()
    if time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) < _SETTLED_NS:
        return None
    return (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)


def write_signed(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON record together with its own checksum, whole or not at all."""
    write_json(path, {**record, _CHECKSUM: _checksum_of(record)})


def read_signed(path: Path) -> dict[str, Any]:
    """Return a record that `write_signed` wrote; raise ValueError if its content differs."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.pop(_CHECKSUM, None) != _checksum_of(record):
        raise ValueError("its checksum differs")
    return record


def _checksum_of(record: Mapping[str, Any]) -> str:
    # Converted to JSON and back first, so that the hash is computed from what a reader will have.
    content = json.loads(json_text(record))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
