"""A classifier that is trained once, and runs that learn from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from one_rank import OneRank
from tiny_runs import config_tree, review_task, write_config
from whole_run import finish

STEPS = 8


class TeacherBench:
    """One teacher that all runs share, the folder they write to, and the sections they share."""

    def __init__(
        self, one_rank: OneRank, folder: Path, model: dict[str, Any], **shared: Any
    ) -> None:
        self.one_rank, self.folder, self.shared = one_rank, folder, shared
        self.task = review_task(folder)
        train = {"per_device_train_batch_size": 8, "max_steps": 30}
        tree = config_tree(folder / "teacher", self.task, student={"model": model}, train=train)
        finish(one_rank, write_config(folder / "teacher.yaml", tree))

    def config(self, out: str, method: dict[str, Any], **sections: Any) -> Path:
        given = {"teacher": {"model": str(self.folder / "teacher" / "final")}, **self.shared}
        given |= sections | {"method": {**self.shared.get("method", {}), **method}}
        given["train"] = {
            "per_device_train_batch_size": 8,
            "max_steps": STEPS,
            **sections.get("train", {}),
        }
        return write_config(
            self.folder / f"{out}.yaml", config_tree(self.folder / out, self.task, **given)
        )

    def run(self, out: str, method: dict[str, Any], *overrides: str, **sections: Any) -> Path:
        finish(self.one_rank, self.config(out, method, **sections), *overrides)
        return self.folder / out
