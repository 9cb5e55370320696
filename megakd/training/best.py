"""The best weights of a stage, by its evaluations.

    checkpoints/<stage>/best/step-<n>/           the best of all evaluations
    checkpoints/<stage>/best-<view>/step-<n>/    the best evaluation of a view

To a checkpoint of step c belong the newest weights up to c. They stay while the checkpoint stays:
a run that goes on from it may not find a later evaluation again. Of a student with adapters, a
folder holds the adapters alone.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megakd.engine.collectives import on_main
from megakd.errors import CheckpointError
from megakd.models.views import Cut, UnitOrder, View
from megakd.process.seals import damage
from megakd.stage import WHOLE, Scores, Verdict
from megakd.training.checkpoint import PARTIAL, steps_in

logger = logging.getLogger(__name__)


_BEST = "best"


class Evaluation(NamedTuple):
    """The scores of all views of a model, or of the model itself, and the view that is kept.

    cut: how the model is cut when it is written; None if `view` defines the cut.
    """

    scores: Scores
    view: str | None
    cut: Cut | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the view that is kept."""
        return {} if self.view is None else self.scores[self.view]

    def scalars(self) -> dict[str, float]:
        """Return the values for the log: the kept metrics, and every view's metrics by name."""
        named = {
            f"eval/{view}/{name}": value
            for view, values in self.scores.items()
            for name, value in values.items()
            if view != WHOLE
        }
        return named | {f"eval/{name}": value for name, value in self.metrics.items()}

    def record(self) -> dict[str, Any]:
        """Return the evaluation as plain values, which a checkpoint stores."""
        scores = {view: dict(values) for view, values in self.scores.items()}
        cut = self.cut and [part and tuple(part) for part in self.cut]
        return {"view": self.view, "scores": scores, "cut": cut}

    @staticmethod
    def read(record: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation of a `record`."""
        order, view = record["cut"] or (None, None)
        cut = record["cut"] and Cut(order and UnitOrder(*order), view and View(*view))
        return Evaluation(record["scores"], record["view"], cut)


class Best:
    """What the evaluations of a stage decide: the weights that it returns, and an early end.

    folder: of the stage's checkpoints.
    write: writes the learner's weights of an evaluation into a folder; a collective.
    views: those whose own best evaluation the judge may ask for.
    keeps: whether the weights of the best evaluation are returned, or those of the last step.
    patience: the number of evaluations without a better score that ends the stage; None: none does.
    misses: the number of such evaluations in a row.
    """

    def __init__(
        self,
        folder: Path,
        write: Callable[[Path, Evaluation], None],
        views: Sequence[str] = (),
        *,
        keeps: bool = True,
        patience: int | None = None,
    ) -> None:
        self._folder, self._write, self._keeps = folder, write, keeps
        self._patience, self.misses = patience, 0
        self._latest = Evaluation({}, None)
        self._score: float | None = None
        names = (_BEST, *(f"{_BEST}-{view}" for view in views))
        self._best: dict[str, dict[str, Any] | None] = dict.fromkeys(names)

    @property
    def is_stale(self) -> bool:
        return self._patience is not None and self.misses >= self._patience

    def extend(self) -> None:
        """Let a stage that has stopped continue, because it has more steps now."""
        if self.is_stale:
            self.misses = 0

    def consider(self, step: int, evaluation: Evaluation, verdict: Verdict) -> None:
        """Write the learner's weights wherever no earlier evaluation was as good; a collective.

        A higher score is better, a tie keeps the earlier weights, and NaN never wins.
        """
        self._latest = evaluation
        if verdict.counts:
            self._count(verdict.score)
        if not self._keeps:
            return
        self._consider(_BEST, step, verdict.score, evaluation)
        for view, score in verdict.of_views.items():
            self._consider(f"{_BEST}-{view}", step, score, Evaluation(evaluation.scores, view))

    def _count(self, score: float) -> None:
        if not math.isnan(score) and (self._score is None or score > self._score):
            self._score, self.misses = score, 0
        else:
            self.misses += 1

    def _consider(self, name: str, step: int, score: float, evaluation: Evaluation) -> None:
        best = self._best[name]
        if math.isnan(score) or (best is not None and not score > best["score"]):
            return
        self._write(self._folder / name / f"step-{step}", evaluation)
        self._best[name] = {"step": step, "score": float(score), "evaluation": evaluation.record()}
        on_main(lambda: self._remove_others(name, step))

    def _remove_others(self, name: str, newest: int) -> None:
        written = steps_in(self._folder / name)
        saved = [*steps_in(self._folder), *steps_in(self._folder, ending=PARTIAL)]
        needed = {max((s for s in written if s <= c), default=newest) for c in saved} | {newest}
        for step in {*written} - needed:
            shutil.rmtree(self._folder / name / f"step-{step}", ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the steps, scores and evaluations of the best weights."""
        counts = {"latest": self._latest.record(), "score": self._score, "misses": self.misses}
        return {**counts, "weights": dict(self._best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the weights that a checkpoint names, and remove later ones; a collective.

        Raises:
            CheckpointError: the weights are missing or damaged.
        """
        self._latest = Evaluation.read(state["latest"])
        self._score, self.misses = state["score"], state["misses"]
        self._best = {name: state["weights"].get(name) for name in self._best}
        on_main(self._remove_later_and_verify)

    def remove(self) -> None:
        """Remove all weights, which are of a start without a checkpoint; a collective."""
        on_main(self._remove_later_and_verify)

    def _remove_later_and_verify(self) -> None:
        for name, best in self._best.items():
            last = -1 if best is None else best["step"]  # without a best, every folder is later
            for step in steps_in(self._folder / name):
                if step > last:  # the run finds such an evaluation again, or another one
                    shutil.rmtree(self._folder / name / f"step-{step}", ignore_errors=True)
            folder = self._folder / name / f"step-{last}"
            if best is not None and (reason := damage(folder)) is not None:
                raise CheckpointError(
                    f"{folder} is damaged: {reason}, and the newest checkpoint needs these "
                    f"weights; remove {self._folder} to train the stage again"
                )

    def returned(self) -> tuple[Path | None, Evaluation, Evaluation]:
        """Return the folder of the weights that the stage returns; None if the learner has them.

        With it: the evaluation that chose the view, whose scores compare the views with each other;
        and that of the weights, which is the view's own best, if it has one.
        """
        name, best = _BEST, self._best[_BEST]
        if best is None:
            return None, self._latest, self._latest
        chosen = evaluation = Evaluation.read(best["evaluation"])
        if of_view := self._best.get(f"{_BEST}-{chosen.view}"):
            name, best = f"{_BEST}-{chosen.view}", of_view
            evaluation = Evaluation.read(of_view["evaluation"])
        if evaluation.metrics != self._latest.metrics:  # which the last line of the log shows
            logger.info("%s: returns the best evaluation, step %d", self._folder.name, best["step"])
        return self._folder / name / f"step-{best['step']}", chosen, evaluation
