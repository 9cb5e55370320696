"""Three teachers of different sizes, and runs that learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from one_rank import OneRank, Outcome
from tiny_runs import bert, config_tree, merged, review_task, write_config
from whole_run import finish

STEPS = 12
SIZES = {"small": (1, 16), "middle": (2, 24), "large": (3, 32)}


class Bench:
    def __init__(self, one_rank: OneRank, folder: Path) -> None:
        self.one_rank, self.folder = one_rank, folder
        self.task = review_task(folder)
        for number, (name, (layers, width)) in enumerate(SIZES.items()):
            train = {"per_device_train_batch_size": 8, "max_steps": 10 + 10 * number}
            sections = {"student": {"model": bert(layers, width=width)}, "train": train}
            tree = config_tree(folder / name, self.task, seed=number, **sections)
            finish(one_rank, write_config(folder / f"{name}.yaml", tree))

    def teachers(self, *names: str) -> list[dict[str, Any]]:
        return [{"name": name, "model": str(self.folder / name / "final")} for name in names]

    def config(self, out: str, method: dict[str, Any], **sections: Any) -> Path:
        task = self.task | sections.pop("task", {})
        train = {"per_device_train_batch_size": 8, "max_steps": STEPS}
        usual = {"teachers": self.teachers(*SIZES), "method": method, "train": train}
        tree = config_tree(self.folder / out, task, **merged(usual, sections))
        return write_config(self.folder / f"{out}.yaml", tree)

    def run(self, out: str, method: dict[str, Any], **sections: Any) -> Path:
        finish(self.one_rank, self.config(out, method, **sections))
        return self.folder / out

    def refused(self, method: dict[str, Any], **sections: Any) -> Outcome:
        config = self.config("refused", method, **sections)
        outcome = self.one_rank.train("--config", config, code=2)
        assert not outcome.loaded
        return outcome
