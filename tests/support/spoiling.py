"""A run that works, its damage in one place, and the message about the damage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from one_rank import OneRank, Outcome
from tiny_runs import bert, config_tree, write_config

from megakd.process.seals import CHECKSUMS

# A teacher that is fine-tuned first would make a late message cost hours.
LATE = {"model": bert(2), "finetune": {}}


class Bench:
    """A run that works, to be spoiled in one place."""

    def __init__(self, folder: Path, reviews: Path, teacher: Path, one_rank: OneRank) -> None:
        self.folder, self.reviews = folder, reviews
        self.teacher, self.one_rank = teacher, one_rank

    def tree(self, task: Mapping[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
        """A run config of classes, with a teacher; `sections` and the task replace its parts."""
        data = {"type": "classification", "dataset": str(self.reviews)}
        usual = {"teacher": {"model": str(self.teacher)}, "method": {"name": "single"}}
        return config_tree(self.folder / "out", {**data, **(task or {})}, **{**usual, **sections})

    def start(self, tree: Mapping[str, Any], *overrides: str) -> Outcome:
        config = write_config(self.folder / "run.yaml", tree)
        return self.one_rank.train("--config", config, *overrides)

    def copied(self, name: str = "copy") -> Path:
        """The teacher's folder as from elsewhere, without checksums, to be damaged."""
        ignored = shutil.ignore_patterns(CHECKSUMS)
        return Path(shutil.copytree(self.teacher, self.folder / name, ignore=ignored))


def assert_told(outcome: Outcome, *fragments: object) -> str:
    """Return the message on standard error, which holds the fragments; nothing is loaded."""
    assert outcome.code == 2, outcome.err
    message = outcome.err.partition("megakd: error: ")[2]
    for fragment in fragments:
        assert str(fragment) in message, message
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.out == ""
    assert outcome.loaded == ()
    return message


def assert_refused(outcome: Outcome, bench: Bench, *fragments: object) -> None:
    """One line on standard error that holds the fragments, and nothing loaded or begun."""
    message = assert_told(outcome, *fragments)
    assert len(message.splitlines()) == 1, message
    assert not (bench.folder / "out" / "config.yaml").exists()
