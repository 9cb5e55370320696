"""The weights of the best evaluations of a stage, beside its checkpoints.

    checkpoints/<stage>/best/step-<n>/           the best of all evaluations
    checkpoints/<stage>/best-<view>/step-<n>/    the best evaluation of a view

To a checkpoint of step c belong the newest weights up to c. They stay while the checkpoint stays:
a run that goes on from it may not find a later evaluation again. Of a student with adapters, a
folder holds the adapters alone.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megakd.contract.stage import Scores, Verdict
from megakd.engine.collectives import on_main
from megakd.errors import CheckpointError
from megakd.scoring.metrics import Evaluation
from megakd.storage.folders import damage
from megakd.training.checkpoint import PARTIAL, steps_in

_BEST = "best"


class ReturnedWeights(NamedTuple):
    """The weights that a stage returns, with their evaluations.

    folder: the folder of the weights; None if the learner has them.
    chosen: the evaluation that chose the view; its scores compare the views with each other.
    evaluation: the evaluation of the weights in `folder`: the view's own best, if it has one.
    """

    folder: Path | None
    chosen: Evaluation
    evaluation: Evaluation


class BestCheckpoints:
    """The best evaluation of a stage, and the best evaluation of each view that its judge requests.

    folder: of the stage's checkpoints.
    write: writes the learner's weights of an evaluation into a folder; a collective.
    """

    def __init__(
        self, folder: Path, write: Callable[[Path, Evaluation], None], views: Sequence[str] = ()
    ) -> None:
        self._folder, self._write = folder, write
        names = (_BEST, *(f"{_BEST}-{view}" for view in views))
        self._best: dict[str, dict[str, Any] | None] = dict.fromkeys(names)

    def consider(self, step: int, scores: Scores, verdict: Verdict) -> None:
        """Write the learner's weights wherever no earlier evaluation was as good; a collective.

        A higher score is better, a tie keeps the earlier weights, and NaN never wins.
        """
        evaluation = Evaluation(scores, verdict.view, verdict.cut)
        self._consider(_BEST, step, verdict.score, evaluation)
        for view, score in verdict.of_views.items():
            self._consider(f"{_BEST}-{view}", step, score, Evaluation(scores, view))

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
        """Return the steps, scores and evaluations of the best weights, for a checkpoint."""
        return dict(self._best)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the weights that a checkpoint names, and remove later ones; a collective.

        Raises:
            CheckpointError: the weights are missing or damaged.
        """
        self._best = {name: state.get(name) for name in self._best}
        on_main(self._check)

    def _check(self) -> None:
        for name, best in self._best.items():
            last = -1 if best is None else best["step"]
            for step in steps_in(self._folder / name):
                if step > last:  # the run finds such an evaluation again, or another one
                    shutil.rmtree(self._folder / name / f"step-{step}", ignore_errors=True)
            folder = self._folder / name / f"step-{last}"
            if best is not None and (reason := damage(folder)) is not None:
                raise CheckpointError(
                    f"{folder} is damaged: {reason}, and the newest checkpoint needs these "
                    f"weights; remove {self._folder} to train the stage again"
                )

    def returned(self) -> ReturnedWeights | None:
        """Return the weights that the stage returns; None if no evaluation was considered."""
        best = self._best[_BEST]
        if best is None:
            return None
        chosen = Evaluation.read(best["evaluation"])
        name = f"{_BEST}-{chosen.view}"
        of_view = self._best.get(name)
        if of_view is not None:
            evaluation = Evaluation.read(of_view["evaluation"])
            return ReturnedWeights(
                self._folder / name / f"step-{of_view['step']}", chosen, evaluation
            )
        return ReturnedWeights(self._folder / _BEST / f"step-{best['step']}", chosen, chosen)
