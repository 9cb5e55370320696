"""Early stopping of a stage, by the rule of Hugging Face's callback."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class EarlyStopping:
    """Counter of consecutive evaluations without a better score.

    patience: the number of such evaluations that ends the stage; None never ends it.
    threshold: a score is better if it exceeds the best score by more than this.
    """

    patience: int | None
    threshold: float = 0.0
    best: float | None = None
    misses: int = 0

    def consider(self, score: float) -> None:
        """Record the score of an evaluation, the same on every rank; higher is better."""
        is_better = not math.isnan(score) and (
            self.best is None or score - self.best > self.threshold
        )
        self.misses = 0 if is_better else self.misses + 1
        # A small improvement is stored although it does not count: scores that increase slowly
        # end the stage.
        if not math.isnan(score):
            self.best = score if self.best is None else max(self.best, score)

    @property
    def stopped(self) -> bool:
        """True if the stage must end."""
        return self.patience is not None and self.misses >= self.patience

    def extend(self) -> None:
        """Let a stage that has stopped continue, because it was given more steps."""
        if self.stopped:
            self.misses = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed stage needs."""
        return {"best": self.best, "misses": self.misses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state that `state_dict` returned."""
        self.best, self.misses = state["best"], state["misses"]
