"""What a result depends on, as a flat mapping, and how two of them differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Fingerprint = dict[str, Any]
ABSENT = object()
_ENDS_BYTES = 1 << 20


def flatten(tree: Any, prefix: str = "") -> Fingerprint:
    """A nested tree as dotted keys, lists by position."""
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


def differences(there: Mapping[str, Any], here: Mapping[str, Any], *, most: int = 5) -> str:
    """`key: 3 there, 4 here; …` for the fields that differ, or an empty string."""
    shown = [
        f"{key}: {_shown(there, key)} there, {_shown(here, key)} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key, ABSENT) != here.get(key, ABSENT)
    ]
    if len(shown) > most:
        shown = [*shown[:most], f"and {len(shown) - most} more"]
    return "; ".join(shown)


def _shown(fields: Mapping[str, Any], key: str) -> str:
    return repr(fields[key]) if key in fields else "absent"


def files_identity(files: Iterable[Path]) -> str:
    """A hash of files' names, sizes, first and last megabyte: cheap for a model of any size."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS_BYTES))
            file.seek(max(0, size - _ENDS_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
