"""Rollouts on disk: a file per optimizer step, written whole before the student learns from it.

rollouts/<stage>/fingerprint.json
rollouts/<stage>/step-00000012.jsonl     a line with the number of texts, then a line per text
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from megakd.contract.completions import Completion, Rollout
from megakd.errors import DataError
from megakd.storage.atomic import set_aside, write_json, write_text
from megakd.storage.fingerprint import Fingerprint, as_read_back

_FORMAT = 1
_FINGERPRINT = "fingerprint.json"


class RolloutStore:
    """The rollouts of one stage; only rank 0 uses the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: dict[int, list[int]] = {}

    def begin(self, fingerprint: Fingerprint, *, may_differ: Collection[str] = ()) -> None:
        """Keep the texts of an interrupted run with the same fingerprint, and set others aside."""
        path, wanted = self.folder / _FINGERPRINT, as_read_back(fingerprint)
        there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else wanted
        if any(there.get(k) != wanted.get(k) for k in {*there, *wanted} - {*may_differ}):
            set_aside(self.folder, "before")
        write_json(path, wanted)

    def has(self, step: int) -> bool:
        return self._path(step).is_file()

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        head = {"format": _FORMAT, "step": step, "rollouts": len(rollouts)}
        lines = [
            json.dumps(tree, separators=(",", ":")) for tree in [head, *map(_record, rollouts)]
        ]
        write_text(self._path(step), "\n".join([*lines, ""]))

    def read(self, step: int) -> list[Rollout]:
        """Return the texts of a step, in the order in which they were written."""
        return read_rollouts(self._path(step))

    def read_one(self, step: int, part: float) -> Rollout:
        """Return the text of a step that is `part` of 0 to 1 down its file, which is not parsed."""
        path = self._path(step)
        if not path.is_file():
            raise DataError(
                f"{path} does not exist, and rollout.mix replays its texts; copy the texts of "
                f"{self.folder.name} there from the run whose checkpoint this one goes on from"
            )
        if step not in self._offsets:
            self._offsets[step] = text_offsets(path)
        offsets = self._offsets[step]
        with _damage_named(path):
            return read_text(path, offsets[int(part * len(offsets))])

    def remove_before(self, first: int, *, kept: Container[int]) -> None:
        for path in rollout_files(self.folder):
            step = int(path.stem.rpartition("-")[2])
            if step < first and step not in kept:
                path.unlink(missing_ok=True)
                self._offsets.pop(step, None)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.jsonl"


def read_rollouts(path: Path) -> list[Rollout]:
    """Return the texts of a file of a `RolloutStore`; raise DataError if it is not whole."""
    with _damage_named(path):
        head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if head["format"] != _FORMAT:
            raise DataError(
                f"{path} has format {head['format']}, and this version reads format {_FORMAT}; "
                "generate the texts again"
            )
        rollouts = [_rollout(line) for line in lines]
        expected = int(head["rollouts"])
    if len(rollouts) != expected:
        raise DataError(
            f"{path} holds {len(rollouts)} rollouts instead of {expected}; remove the file, and "
            "its texts are generated again"
        )
    return rollouts


def text_offsets(path: Path) -> list[int]:
    """Return the byte at which the line of each text begins in a file of a `RolloutStore`."""
    with _damage_named(path), path.open("rb") as file:
        return [*accumulate(map(len, file))][:-1]


def read_text(path: Path, offset: int) -> Rollout:
    """Return the text whose line begins at a byte of a file."""
    with _damage_named(path), path.open("rb") as file:
        file.seek(offset)
        return _rollout(json.loads(file.readline()))


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is not a complete file of rollouts ({type(error).__name__}: {error}); remove "
            "the file, and its texts are generated again"
        ) from error


def rollout_files(folder: Path) -> list[Path]:
    """Return the files of a `RolloutStore`, by step."""
    files = folder.glob("*.jsonl")
    return sorted(path for path in files if re.fullmatch(r"step-\d+\.jsonl", path.name))


def _record(rollout: Rollout) -> dict[str, object]:
    return {
        "row": rollout.row,
        "version": rollout.version,
        "seed": rollout.seed,
        "finished": rollout.completion.finished,
        "prompt": list(rollout.prompt),
        "completion": list(rollout.completion.ids),
    }


def _rollout(record: Mapping[str, Any]) -> Rollout:
    ids = cast("list[int]", record["completion"])
    return Rollout(
        row=int(record["row"]),
        prompt=tuple(map(int, record["prompt"])),
        completion=Completion(tuple(map(int, ids)), finished=bool(record["finished"])),
        version=int(record["version"]),
        seed=int(record["seed"]),
    )
