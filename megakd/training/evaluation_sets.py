"""Scores of several models on the named evaluation sets of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megakd.contract.tasks import STUDENT
from megakd.data.choosing import is_labelled

if TYPE_CHECKING:
    from datasets import Dataset

    from megakd.contract.results import EvaluationSetReport
    from megakd.teachers.frozen import FrozenTeacher
    from megakd.training.engines import Assembly


def row_count(rows: Dataset) -> int:
    """Return the number of scored rows: rows with a label, or all rows of a language task."""
    return int(np.count_nonzero(is_labelled(rows)))


@dataclass(frozen=True)
class SetScores:
    """Scorer of loaded models on every named set; it keeps the metrics."""

    assembly: Assembly
    _metrics: dict[str, dict[str, Mapping[str, float]]] = field(default_factory=dict)

    def scoring(
        self,
        model: str,
        and_then: Callable[[FrozenTeacher], None] | None,
        *,
        role: str = STUDENT,
    ) -> Callable[[FrozenTeacher], None]:
        """Return a function that scores a loaded model and then calls `and_then`.

        Args:
            model: name of the model in the report.
            and_then: called with the loaded model; None: nothing.
            role: the role whose tokenizer the model has.
        """
        own = self.assembly.of(role)

        def score(loaded: FrozenTeacher) -> None:
            for name, rows in own.prepared.encoded.evaluation_sets.items():
                metrics = own.scorer().score(loaded.predict, rows)
                self._metrics.setdefault(name, {})[model] = metrics
            if and_then is not None:
                and_then(loaded)

        return score

    def report(self) -> dict[str, EvaluationSetReport]:
        """Return the scores in the format of report.json."""
        return {
            name: {"rows": row_count(rows), "metrics": self._metrics.get(name, {})}
            for name, rows in self.assembly.prepared.splits.evaluation_sets.items()
        }
