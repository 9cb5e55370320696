"""Rollouts on disk: a file per optimizer step, written whole before the student learns from it.

rollouts/<stage>/step-00000012.jsonl     a line with the number of texts, then a line per text
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from megakd.contract.completions import Completion, Rollout
from megakd.errors import DataError
from megakd.storage.atomic import write_text


class RolloutStore:
    """The rollouts of one stage; only rank 0 uses the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Remove all texts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, step: int) -> bool:
        return self._path(step).is_file()

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        trees = [{"rollouts": len(rollouts)}, *map(_record, rollouts)]
        lines = (json.dumps(tree, separators=(",", ":")) + "\n" for tree in trees)
        write_text(self._path(step), "".join(lines))

    def read(self, step: int) -> list[Rollout]:
        """Return the texts of a step as written; raise DataError if the file is not whole."""
        path = self._path(step)
        try:
            head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            return [_rollout(lines[number]) for number in range(head["rollouts"])]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path} is not a complete file of rollouts ({type(error).__name__}: {error}); "
                "remove the file, and its texts are generated again"
            ) from error

    def remove_before(self, first: int) -> None:
        for path in self.folder.glob(f"step-{'[0-9]' * 8}.jsonl"):
            if int(path.stem.removeprefix("step-")) < first:
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.jsonl"


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
