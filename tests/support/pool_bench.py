"""Three teachers of different sizes, and runs that learn from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from one_rank import OneRank, Outcome
from tiny_runs import bert, config_tree, write_config, write_reviews
from whole_run import finish

STEPS = 12
SIZES = {"small": (1, 16), "middle": (2, 24), "large": (3, 32)}


class Bench:
    def __init__(self, one_rank: OneRank, folder: Path) -> None:
        self.one_rank, self.folder = one_rank, folder
        reviews = write_reviews(folder / "reviews")
        self.task = {"type": "classification", "dataset": str(reviews)}
        for number, (name, (layers, width)) in enumerate(SIZES.items()):
            tree = config_tree(
                folder / name, self.task, student={"model": bert(layers, width=width)}, seed=number
            )
            tree["train"] |= {"per_device_train_batch_size": 8, "max_steps": 10 + 10 * number}
            finish(one_rank, write_config(folder / f"{name}.yaml", tree))

    def teachers(self, *names: str) -> list[dict[str, Any]]:
        return [{"name": name, "model": str(self.folder / name / "final")} for name in names]

    def config(self, out: str, method: dict[str, Any], **sections: Any) -> Path:
        models = {"teachers": self.teachers(*SIZES), "method": method}
        task = self.task | sections.pop("task", {})
        tree = config_tree(self.folder / out, task, **{**models, **sections})
        usual = {"per_device_train_batch_size": 8, "max_steps": STEPS}
        tree["train"] |= usual | sections.get("train", {})
        return write_config(self.folder / f"{out}.yaml", tree)

    def run(self, out: str, method: dict[str, Any], **sections: Any) -> Path:
        finish(self.one_rank, self.config(out, method, **sections))
        return self.folder / out

    def refused(self, method: dict[str, Any], **sections: Any) -> Outcome:
        outcome = self.one_rank.train("--config", self.config("refused", method, **sections))
        assert outcome.code == 2, outcome.out
        assert not outcome.loaded
        return outcome
