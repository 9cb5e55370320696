"""Flat mappings of the values that a result depends on, and their differences."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Fingerprint = dict[str, Any]
_ABSENT = object()
_MOST_SHOWN = 5
_BLOCK = 1 << 16
_STRIDE = 1 << 20
_READ_WHOLE = 1 << 28


def flatten(tree: Any, prefix: str = "") -> Fingerprint:
    """Return a nested tree as a flat mapping with dotted keys; list items get their position."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: Fingerprint = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return `key: 3 there, 4 here; …` for the fields that differ, or an empty string."""
    shown = [
        f"{key}: {_shown(there, key)} there, {_shown(here, key)} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key, _ABSENT) != here.get(key, _ABSENT)
    ]
    if len(shown) > _MOST_SHOWN:
        shown = [*shown[:_MOST_SHOWN], f"and {len(shown) - _MOST_SHOWN} more"]
    return "; ".join(shown)


def _shown(fields: Mapping[str, Any], key: str) -> str:
    return repr(fields[key]) if key in fields else "absent"


def files_identity(files: Iterable[Path]) -> str:
    """Return a hash of the names, sizes and contents of files; large files are sampled.

    Of a file above 256 MiB, 64 KiB of every MiB and the last 64 KiB are read. This is fast for
    models of any size and samples every large matrix, also in the middle of the file: if only some
    layers were trained further, the beginning and the end of the file are unchanged.
    """
    digest = hashlib.sha256()
    for path in files:
        facts = path.stat()
        digest.update(f"{path.name}:{facts.st_size}:".encode())
        digest.update(_content(path, facts.st_size, (facts.st_ino, facts.st_mtime_ns)))
    return digest.hexdigest()


@functools.cache
def _content(path: Path, size: int, written: tuple[int, int]) -> bytes:
    del written  # part of the cache key: a rewritten file is read again
    digest, step = hashlib.sha256(), _BLOCK if size <= _READ_WHOLE else _STRIDE
    with path.open("rb") as file:
        for start in (*range(0, size, step), max(0, size - _BLOCK)):
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.digest()
