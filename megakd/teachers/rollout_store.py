"""The files of rollouts: a step has one, written whole before the student learns from it.

rollouts/<stage>/step-00000012.jsonl     a line with the number of texts, then a line per text
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megakd.contract.completions import Rollout
from megakd.contract.tasks import file_of_step
from megakd.errors import DataError
from megakd.process.atomic import write_text


class RolloutStore:
    """The rollouts of one stage; only rank 0 uses the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Remove all texts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, step: int) -> bool:
        return file_of_step(self.folder, step).is_file()

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        trees = [{"rollouts": len(rollouts)}, *(rollout._asdict() for rollout in rollouts)]
        lines = (json.dumps(tree, separators=(",", ":")) + "\n" for tree in trees)
        write_text(file_of_step(self.folder, step), "".join(lines))

    def read(self, step: int) -> list[Rollout]:
        """Return the texts of a step as written; raise DataError if the file is not whole."""
        path = file_of_step(self.folder, step)
        try:
            head, *trees = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            lists = [Rollout(**trees[number]) for number in range(head["rollouts"])]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path} is not a complete file of rollouts ({type(error).__name__}: {error}); "
                "remove the file, and its texts are generated again"
            ) from error
        return [
            text._replace(prompt=tuple(text.prompt), completion=tuple(text.completion))
            for text in lists
        ]

    def remove_before(self, first: int) -> None:
        for path in self.folder.glob(f"step-{'[0-9]' * 8}.jsonl"):
            if int(path.stem.removeprefix("step-")) < first:
                path.unlink(missing_ok=True)
