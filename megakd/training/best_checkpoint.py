"""The weights of the best evaluation, beside the checkpoints and not counted in their limit.

Of a student with adapters, the folder holds the adapters alone.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megakd.contract.stage import Scores, Verdict
from megakd.engine.collectives import on_main
from megakd.scoring.scores import Evaluation
from megakd.storage import atomic
from megakd.storage.folders import damage

logger = logging.getLogger(__name__)
RECORD = "best.json"


@dataclass(kw_only=True)
class BestCheckpoint:
    """`checkpoints/<stage>/best/`: a model folder with its step and its scores.

    write: writes the learner's model folder with the record; a collective.
    settle: completes the checkpoint that is being written beside the training; a collective.
    is_redone: the run goes on from before an evaluation that was better than those up to there.
    recorded: the step that the newest checkpoint names. Its weights are set aside, not overwritten,
        because a run that goes on from this checkpoint may not find the better evaluation again.
    """

    folder: Path
    write: Callable[[Path, Mapping[str, Any]], None]
    settle: Callable[[], None] = lambda: None
    score: float | None = None
    step: int | None = None
    is_redone: bool = False
    recorded: int | None = None

    @property
    def before(self) -> Path:
        """The weights of the best evaluation that a checkpoint names, if it was replaced since."""
        return self.folder.with_name(f"{self.folder.name}.before")

    def take(self, folder: Path) -> None:
        """Copy the weights beside a checkpoint of another run; call on rank 0."""
        if folder.resolve() == self.folder.parent.resolve():
            return
        for here in (self.folder, self.before):
            there = folder / here.name
            if _record_in(there) is not None:
                with atomic.replaced_folder(here) as temporary:
                    shutil.copytree(there, temporary, dirs_exist_ok=True)

    def resume(self, step: int, best_step: int | None) -> None:
        """Take over the stored best weights; remove them if the run resumes before their step.

        Weights that no checkpoint knows may be those of another config, and are removed too.
        Damaged weights are set aside: shared storage may show their files later. So are those of
        another step, where the run has begun from a named checkpoint. `best_step` is the
        step of the best evaluation, as recorded in the checkpoint of `step`.
        """

        def read() -> Mapping[str, Any] | None:
            atomic.recover(self.folder)
            record = self.record()
            if record is None or record["step"] != best_step:
                record = self._brought_back(best_step) or record
            is_later = record is not None and (best_step is None or record["step"] > step)
            is_other = record is None or record["step"] != best_step
            if is_other and not is_later and best_step is not None and not self.is_redone:
                logger.warning(
                    "%s is missing or damaged (%s): the best evaluation, of step %d, is lost; "
                    "only evaluations after step %d are compared",
                    self.folder,
                    damage(self.folder) or "weights of another step",
                    *(best_step, step),
                )
            if is_later:
                shutil.rmtree(self.folder, ignore_errors=True)
            elif is_other and self.folder.exists():
                atomic.set_aside(self.folder)
            return None if is_later or is_other else record

        record = on_main(read)
        if record is not None:
            self.step, self.score = record["step"], record["score"]
        self.recorded = self.step

    def _brought_back(self, best_step: int | None) -> Mapping[str, Any] | None:
        record = _record_in(self.before)
        if record is None or record["step"] != best_step:
            return None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.before.rename(self.folder)
        return record

    def record_step(self) -> int | None:
        """Return the step of the weights, for a checkpoint; a collective.

        The checkpoints before this one are complete.
        """
        if self.recorded == self.step:
            on_main(self._drop_before)
        self.recorded = self.step
        return self.step

    def _drop_before(self) -> None:
        shutil.rmtree(self.before, ignore_errors=True)

    def consider(self, step: int, score: float, evaluation: Mapping[str, Any]) -> bool:
        """Keep the learner's weights if no earlier evaluation was as good; a collective.

        A higher score is better, a tie keeps the earlier weights, and NaN never wins.
        """
        if math.isnan(score) or (self.score is not None and not score > self.score):
            return False
        if self.step is not None and self.step == self.recorded:
            # Until the newest checkpoint is complete, the one before it names the weights there.
            if on_main(self.before.exists):
                self.settle()
            on_main(self._set_before)
        # JSON cannot represent an infinite number: it is stored as text.
        stored = score if math.isfinite(score) else str(score)
        self.write(self.folder, {"step": step, "score": stored, "evaluation": evaluation})
        self.score, self.step = score, step
        return True

    def _set_before(self) -> None:
        self._drop_before()
        if self.folder.exists():
            self.folder.rename(self.before)

    def is_lost(self) -> bool:
        """Return whether no whole weights are stored."""
        atomic.recover(self.folder)
        return self.record() is None and _record_in(self.before) is None

    def kept(self) -> dict[str, Any] | None:
        """Return the record of the best evaluation, or None; warn if the record was lost."""
        self._drop_before()
        record = self.record()
        if record is None and self.step is not None:
            logger.warning(
                "%s is missing or damaged (%s): its weights, of step %d, are not used",
                *(self.folder, damage(self.folder), self.step),
            )
        return record

    def record(self) -> dict[str, Any] | None:
        """Return the record in the folder, or None if the folder is not complete."""
        return _record_in(self.folder)


def _record_in(folder: Path) -> dict[str, Any] | None:
    if damage(folder) is not None:
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        score = float(record["score"])
        evaluation = dict(record["evaluation"])
        return {"step": int(record["step"]), "score": score, "evaluation": evaluation}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class ReturnedWeights(NamedTuple):
    """The weights that a stage has kept, with their evaluations.

    folder: the folder of the weights; None if the learner has them.
    chosen: the evaluation that chose the view; its scores compare the views with each other.
    evaluation: the evaluation of the weights in `folder`: the view's own best, if kept as well.
    """

    folder: Path | None
    chosen: Evaluation
    evaluation: Evaluation


class BestCheckpoints:
    """The best evaluation of a stage, and the best evaluation of each view that its judge requests.

    The folders `best/` and `best-<view>/` lie beside the stage's checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        write: Callable[[Path, Mapping[str, Any]], None],
        views: Sequence[str] = (),
        *,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._named = {
            name: BestCheckpoint(folder=folder / name, write=write, settle=settle)
            for name in ("best", *(f"best-{view}" for view in views))
        }

    def consider(self, step: int, scores: Scores, verdict: Verdict) -> None:
        evaluation = Evaluation(scores, verdict.view, verdict.cut)
        self._named["best"].consider(step, verdict.score, evaluation.record())
        for view, score in verdict.of_views.items():
            self._named[f"best-{view}"].consider(step, score, Evaluation(scores, view).record())

    def steps(self) -> dict[str, int | None]:
        """Return the steps of the best evaluations, for a checkpoint; a collective."""
        return {name: best.record_step() for name, best in self._named.items()}

    def first_lost(self, steps: Mapping[str, int | None]) -> int | None:
        """Return the first of `steps` whose weights are missing or damaged, or None; a collective.

        A run that goes on from before this step evaluates it again.
        """
        named = [(best, steps.get(name)) for name, best in self._named.items()]
        return on_main(
            lambda: min((s for best, s in named if s is not None and best.is_lost()), default=None)
        )

    def redo(self) -> None:
        """Expect that the run goes on from before `first_lost`."""
        for best in self._named.values():
            best.is_redone = True

    def take(self, folder: Path) -> None:
        """Copy the best weights beside a checkpoint of another run; a collective."""
        on_main(lambda: [best.take(folder) for best in self._named.values()])

    def resume(self, step: int, steps: Mapping[str, int | None]) -> None:
        """Take over the best weights of `steps`, none later than `step`; a collective."""
        for name, best in self._named.items():
            best.resume(step, steps.get(name))

    def kept(self) -> ReturnedWeights | None:
        """Return the weights that the stage gives; None if no evaluation was kept; a collective."""
        best = self._named["best"]
        record = on_main(best.kept)
        if record is None:
            return None
        chosen = Evaluation.read(record["evaluation"])
        of_view = self._named.get(f"best-{chosen.view or ''}")
        record = None if of_view is None else on_main(of_view.kept)
        if of_view is None or record is None:
            return ReturnedWeights(best.folder, chosen, chosen)
        return ReturnedWeights(of_view.folder, chosen, Evaluation.read(record["evaluation"]))
