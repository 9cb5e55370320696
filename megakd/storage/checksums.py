"""Checksums of files and of JSON records, so that damage is found before anything is used."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megakd.storage.atomic import json_text, sha256_of, write_json, write_tensors

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
