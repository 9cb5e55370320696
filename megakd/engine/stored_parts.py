"""The state of an engine in a checkpoint, which any number of ranks at any ZeRO stage can read.

    <checkpoint>/engine-<r>.pt    rank r's part of every value of the optimizer, and where it begins

A value is a weight or one of its moments. The files are mapped into memory, so that a rank reads
only the elements that it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megakd.errors import CheckpointError

_PREFIX, _SUFFIX = "engine-", ".pt"
Parts = Mapping[str, Mapping[str, Tensor]]
"""Parts [n] of flattened values, by kind of value and by name of the weight."""


def file_of(
    rank: int, parts: Parts, *, offsets: Mapping[str, int], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of the file of one rank, by the name of the file.

    Args:
        offsets: index of a part's first element in the flattened weight, by name.
        facts: plain values that are the same on all ranks.
    """
    plain = {kind: dict(by_name) for kind, by_name in parts.items()}
    content = {"parts": plain, "offsets": dict(offsets), "facts": dict(facts)}
    return {f"{_PREFIX}{rank}{_SUFFIX}": content}


class StoredParts:
    """The parts that all ranks wrote into a folder.

    facts: the plain values of `file_of`.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))
        if not paths:
            raise CheckpointError(f"{folder} has no {_PREFIX}<rank>{_SUFFIX}")
        self._files: Sequence[Mapping[str, Any]] = [
            torch.load(path, mmap=True, map_location="cpu", weights_only=True) for path in paths
        ]
        self.facts: Mapping[str, Any] = self._files[0]["facts"]

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of the weights by kind of value, in the same order on all ranks."""
        by_kind: dict[str, dict[str, None]] = {}
        for file in self._files:
            for kind, by_name in file["parts"].items():
                by_kind.setdefault(kind, {}).update(dict.fromkeys(by_name))
        return {kind: [*names] for kind, names in by_kind.items()}

    def size(self, kind: str, name: str) -> int:
        """Return the number of elements of a value that are stored."""
        return sum(len(part) for _, part in self._pieces(kind, name))

    def read(self, kind: str, name: str, wanted: slice) -> Tensor:
        """Return some elements of a flattened value, [stop - start] on the CPU."""
        values = torch.zeros(wanted.stop - wanted.start)
        for offset, part in self._pieces(kind, name):
            first, last = max(offset, wanted.start), min(offset + len(part), wanted.stop)
            if first < last:
                here = part[first - offset : last - offset]
                values[first - wanted.start : last - wanted.start] = here
        return values

    def _pieces(self, kind: str, name: str) -> Iterator[tuple[int, Tensor]]:
        for file in self._files:
            part = file["parts"].get(kind, {}).get(name)
            if part is not None:
                yield file["offsets"][name], part
