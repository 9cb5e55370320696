"""Scores of several models on the named sets of rows of a run."""

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
    from megakd.training.inputs import RunInputs
    from megakd.training.scoring import Scorer


def row_count(rows: Dataset) -> int:
    """How many rows of text are scored: those with a label, or all of a language task."""
    return int(np.count_nonzero(is_labelled(rows)))


@dataclass(frozen=True)
class SetScores:
    """Scores models on every named set while they are loaded, and keeps the metrics."""

    prepared: RunInputs
    scorer: Scorer
    _metrics: dict[str, dict[str, Mapping[str, float]]] = field(default_factory=dict)

    def scoring(
        self, model: str, and_then: Callable[[FrozenTeacher], None] | None
    ) -> Callable[[FrozenTeacher], None]:
        """Return a function that scores the loaded model of that name, and then calls another."""

        def score(loaded: FrozenTeacher) -> None:
            for name, rows in self.prepared.encoded.evaluation_sets.items():
                metrics = self.scorer.score(loaded.predict, rows)
                self._metrics.setdefault(name, {})[model] = metrics
            if and_then is not None:
                and_then(loaded)

        return score

    def report(self) -> dict[str, EvaluationSetReport]:
        """Return the scores as report.json holds them."""
        return {
            name: {"rows": row_count(rows), "metrics": self._metrics.get(name, {})}
            for name, rows in self.prepared.splits.evaluation_sets.items()
        }
