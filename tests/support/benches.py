"""Runs of one kind in one folder: what they share, the models they learn from, and what is read."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from one_rank import OneRank, Outcome
from tiny_runs import config_tree, merged, review, write_config
from whole_run import finish, forgotten, read, weights

ROWS = 40
EXPERTS = ("math", "code")


class Bench:
    """Runs that share a task and sections; a run merges its own into them.

    A key of the task that a run sets to None is left out.
    """

    def __init__(
        self, one_rank: OneRank, folder: Path, task: Mapping[str, Any], **shared: Any
    ) -> None:
        self.one_rank, self.folder, self.task, self.shared = one_rank, folder, task, shared

    def config(self, out: str, method: Mapping[str, Any] | None = None, **sections: Any) -> Path:
        if method is not None:
            sections["method"] = method
        task = {**self.task, **sections.pop("task", {})}
        keys = {key: value for key, value in task.items() if value is not None}
        tree = config_tree(self.folder / out, keys, **merged(dict(self.shared), sections))
        return write_config(self.folder / f"{out}.yaml", tree)

    def run(
        self, out: str, method: Mapping[str, Any] | None = None, *overrides: str, **sections: Any
    ) -> Path:
        finish(self.one_rank, self.config(out, method, **sections), *overrides)
        return self.folder / out

    def continued(
        self, name: str, folder: Path, stage: str, after: int, following: tuple[str, ...] = ()
    ) -> Path:
        """A copy of a finished run that goes on from a step of a stage, see `forgotten`."""
        killed = forgotten(
            self.folder / name, folder / "killed", stage=stage, after=after, following=following
        )
        outcome = finish(self.one_rank, self.folder / f"{name}.yaml", f"output_dir={killed}")
        assert f"{stage}: resumed at step {after}" in outcome.err
        return killed

    def refused(self, method: Mapping[str, Any] | None = None, **sections: Any) -> Outcome:
        """The outcome of a run that ends before anything is loaded."""
        config = self.config("refused", method, **sections)
        outcome = self.one_rank.train("--config", config, code=2)
        assert not outcome.loaded
        return outcome

    def make(self, name: str, model: Mapping[str, Any], steps: int, **sections: Any) -> Path:
        """Train a model for the task by itself."""
        train = {"per_device_train_batch_size": 8, "max_steps": steps}
        tree = config_tree(
            self.folder / name, self.task, student={"model": model}, train=train, **sections
        )
        finish(self.one_rank, write_config(self.folder / f"{name}.yaml", tree))
        return self.folder / name / "final"

    def teachers(self, *names: str) -> list[dict[str, Any]]:
        """Teachers by name; `a:b` is a teacher named a with the weights of b."""
        pairs = [(name.split(":") * 2)[:2] for name in names]
        return [{"name": a, "model": str(self.folder / b / "final")} for a, b in pairs]


def furthest(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between the weights of two models."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def furthest_students(one: Path, other: Path) -> float:
    return furthest(weights(one / "final"), weights(other / "final"))


def taught_by(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of the pool in the report, by the name of the teacher."""
    return {entry["name"]: entry for entry in read(out)["pool"]}


def expert_rows(count: int = ROWS) -> list[dict[str, Any]]:
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
