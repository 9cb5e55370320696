"""Scores of several models on the named evaluation sets of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megakd.data.choosing import is_labelled

if TYPE_CHECKING:
    from datasets import Dataset

    from megakd.contract.results import EvaluationSetReport
    from megakd.teachers.frozen import FrozenTeacher
    from megakd.training.assembly import Assembly


def row_count(rows: Dataset) -> int:
    """Return the number of scored rows: rows with a label, or all rows of a language task."""
    return int(np.count_nonzero(is_labelled(rows)))


def set_metrics(own: Assembly, loaded: FrozenTeacher) -> dict[str, dict[str, float]]:
    """Return the metrics of a loaded model, with its tokenizer in `own`, by set; a collective."""
    sets = own.prepared.encoded.evaluation_sets
    return {name: own.scorer().score(loaded.predict, rows) for name, rows in sets.items()}


@dataclass(frozen=True)
class SetScores:
    """Scorer of loaded models on every named set; it keeps the metrics."""

    assembly: Assembly
    _metrics: dict[str, dict[str, Mapping[str, float]]] = field(default_factory=dict)

    def scoring(
        self, model: str, and_then: Callable[[FrozenTeacher], None] | None
    ) -> Callable[[FrozenTeacher], None]:
        """Return a function that scores a loaded model under a name, and then calls `and_then`."""

        def score(loaded: FrozenTeacher) -> None:
            self.add(model, set_metrics(self.assembly, loaded))
            if and_then is not None:
                and_then(loaded)

        return score

    def add(self, model: str, metrics: Mapping[str, Mapping[str, float]]) -> None:
        for name, measured in metrics.items():
            self._metrics.setdefault(name, {})[model] = measured

    def report(self) -> dict[str, EvaluationSetReport]:
        return {
            name: {"rows": row_count(rows), "metrics": self._metrics.get(name, {})}
            for name, rows in self.assembly.prepared.splits.evaluation_sets.items()
        }
