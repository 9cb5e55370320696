"""Two experts, rows that name one of them, and runs of a student that learns from both."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cache_bench
from one_rank import OneRank, Outcome
from tiny_runs import bert, config_tree, merged, review, write_config, write_jsonl, write_reviews
from whole_run import finish, read, weights

STEPS, ROWS = 6, 40
EXPERTS = ("math", "code")


def rows(count: int = ROWS) -> list[dict[str, Any]]:
    """Labelled rows; of three rows in turn, two name math and one names code."""
    rng = random.Random(5)
    return [
        {
            "text": f"{review(rng, good=number % 2 == 0)} n{number}",
            "label": ("positive", "negative")[number % 2],
            "expert": EXPERTS[number % 3 == 2],
        }
        for number in range(count)
    ]


def teachers_in(folder: Path, *names: str) -> list[dict[str, Any]]:
    """Teachers by name; `a:b` is a teacher named a with the weights of b."""
    pairs = [(name.split(":") * 2)[:2] for name in names]
    return [{"name": a, "model": str(folder / b / "final")} for a, b in pairs]


class RoutedBench:
    """Two classifiers that know different things, and runs that learn from them."""

    def __init__(self, one_rank: OneRank, folder: Path) -> None:
        self.one_rank, self.folder = one_rank, folder
        self.data = write_reviews(folder / "reviews")
        write_jsonl(self.data / "train.jsonl", rows())
        for number, name in enumerate(EXPERTS):
            tree = config_tree(
                folder / name,
                {"type": "classification", "dataset": str(self.data)},
                student={"model": bert(2)},
                train={"per_device_train_batch_size": 8, "max_steps": 8},
                seed=number,
            )
            finish(one_rank, write_config(folder / f"{name}.yaml", tree))

    def teachers(self, *names: str) -> list[dict[str, Any]]:
        return teachers_in(self.folder, *names)

    def config(self, out: str, *, task: dict[str, Any] | None = None, **sections: Any) -> Path:
        usual = {"type": "classification", "dataset": str(self.data)}
        named = {"teacher_column": "expert", **(task or {})}
        given: dict[str, Any] = {"teachers": self.teachers(*EXPERTS), "method": {"name": "routed"}}
        kept = {key: value for key, value in (usual | named).items() if value is not None}
        given["train"] = {"per_device_train_batch_size": 8, "max_steps": STEPS}
        tree = config_tree(self.folder / out, kept, **merged(given, sections))
        return write_config(self.folder / f"{out}.yaml", tree)

    def run(self, out: str, **sections: Any) -> Path:
        finish(self.one_rank, self.config(out, **sections))
        return self.folder / out

    def refused(self, **sections: Any) -> Outcome:
        outcome = self.one_rank.train("--config", self.config("refused", **sections), code=2)
        assert not outcome.loaded
        return outcome


def furthest(one: Path, other: Path) -> float:
    """The largest difference between the weights of two students."""
    return cache_bench.furthest(weights(one / "final"), weights(other / "final"))


def taught_by(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of the pool in the report, by the name of the teacher."""
    return {entry["name"]: entry for entry in read(out)["pool"]}
