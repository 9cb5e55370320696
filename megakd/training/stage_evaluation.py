"""The evaluations of a stage: scores, losses on held-out rows, early stopping, the best weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from megakd.contract.batch import SOURCE_UNITS, Batch, Predictions, count_units
from megakd.contract.results import WHOLE, MetricJudge
from megakd.contract.stage import Pass
from megakd.engine.collectives import all_reduce_
from megakd.losses.bundle import StudentBundle
from megakd.scoring.metrics import Evaluation
from megakd.training.best_checkpoint import BestCheckpoints, ReturnedWeights
from megakd.training.checkpoint import CheckpointState
from megakd.training.stage_batches import StageExtra
from megakd.training.stage_model import StageModel
from megakd.training.trainer import Trainer


class StageEvaluation:
    """Scores the held-out rows while a stage runs, and remembers what the stage returns.

    folder: of the stage's checkpoints; the best weights lie beside them.
    """

    def __init__(
        self,
        model: StageModel,
        trainer: Trainer,
        folder: Path,
        extras: Sequence[StageExtra],
    ) -> None:
        stage, self._trainer = model.stage, trainer
        self._stage, self._student, self._bundle = stage, model.student, model.bundle
        assembly = model.assembly
        prepared = assembly.of(stage.role).prepared
        self._rows, self._eval = prepared.encoded.validation, assembly.config.eval
        self.scorer = assembly.of(stage.role).scorer(stage.train)
        self._extras = extras
        self._judge = stage.judge or MetricJudge(prepared.metric)
        self.best = BestCheckpoints(folder, model.write_best, tuple(stage.views))
        self._latest = Evaluation({}, None)
        self.stopping = EarlyStopping(
            patience=stage.train.early_stopping_patience,
            threshold=stage.train.early_stopping_threshold,
        )

    @property
    def states(self) -> dict[str, CheckpointState]:
        """Return the state that a checkpoint keeps."""
        stopping = self.stopping
        return {
            "evaluation": CheckpointState(self._record_latest, self._read_latest),
            "early_stopping": CheckpointState(stopping.state_dict, stopping.load_state_dict),
            "best": CheckpointState(self.best.state_dict, self.best.load_state_dict),
        }

    def _record_latest(self) -> dict[str, Any]:
        return self._latest.record()

    def _read_latest(self, record: Mapping[str, Any]) -> None:
        self._latest = Evaluation.read(record)

    @property
    def _keeps_best(self) -> bool:
        if self._stage.goes_on:
            return False
        wanted = self._eval.keep_best
        return self._eval.eval_steps is not None if wanted is None else wanted

    def evaluate(self, step: int, report: Callable[[Mapping[str, float]], None]) -> None:
        """Score the student, report the scores, and keep its weights if they are the best."""
        scores = self._scores()
        verdict = self._judge(scores, step)
        self._latest = Evaluation(scores, verdict.view, verdict.cut)
        report(self._latest.scalars())
        if verdict.counts and not self._stage.goes_on:
            self.stopping.consider(verdict.score)
        if self._keeps_best:
            self.best.consider(step, scores, verdict)

    def returned(self) -> ReturnedWeights:
        """Return the weights that the stage returns: the best, or else those of its last step."""
        best = self.best.returned() if self._keeps_best else None
        return best or ReturnedWeights(None, self._latest, self._latest)

    def _scores(self) -> dict[str, dict[str, float]]:
        views = tuple(self._stage.views) or (WHOLE,)
        predict, losses = self._predictions, None
        if self._stage.measures_losses:
            losses = HeldOutLosses(self._trainer, self._bundle, self._passes, views)
            predict = losses.add  # scores and losses come out of one forward
        scored = self.scorer.scored_views(predict, self._rows)
        means = {} if losses is None else losses.means()
        scores = {view: scored[view].metrics | means.get(view, {}) for view in views}
        for extra in self._extras:
            scores[views[0]] |= extra.scores(self._trainer.step)
        return scores

    @property
    def _passes(self) -> tuple[Pass, ...]:
        planned = self._trainer.strategy.measured_passes(self._trainer.step)
        # Weights chosen by outputs are decisions of a step, and held-out rows decide nothing.
        return tuple(replace(one, weigh=None) for one in planned)

    def _predictions(self, batch: Batch) -> dict[str, Predictions]:
        predict, views = self._student.predict, self._stage.views
        # One view at a time: their outputs need not fit into memory together.
        return {view: predict(batch, view) for view in views} or {WHOLE: predict(batch)}


class HeldOutLosses:
    """Means of the loss terms by view; a micro-batch asks each teacher and runs each view once."""

    def __init__(
        self,
        trainer: Trainer,
        bundle: StudentBundle,
        plan: Sequence[Pass],
        views: Sequence[str],
    ) -> None:
        self._trainer, self._bundle, self._plan = trainer, bundle, plan
        self._views = {view: None if view == WHOLE else view for view in views}
        # A row for each view, and the counts, which all views share.
        terms = len(bundle.objective.units)
        self._sums = torch.zeros(len(views) + 1, terms, dtype=torch.float64)

    def add(self, batch: Batch) -> dict[str, Predictions]:
        """Measure a micro-batch, of which every rank has equally many; return its predictions."""
        names = tuple(self._views.values())
        answers = self._trainer.ask_teachers(self._plan, batch)
        measured = self._trainer.student.measure(batch, answers, self._plan, names)
        counts = count_units([batch], self._bundle.counters)
        for place, (term, unit) in enumerate(self._bundle.objective.units.items()):
            for row, name in enumerate(names):
                part = measured.parts.get(f"{name}/{term}" if name else term)
                self._sums[row, place] += 0.0 if part is None else part.double().cpu()
            self._sums[-1, place] += counts[unit].cpu()
        made = measured.predictions
        return {view: made[name] for view, name in self._views.items() if name in made}

    def means(self) -> dict[str, dict[str, float]]:
        """Return the mean of every term over its own unit, by view; a collective.

        A term limited to a source (`on`) is left out if the rows have no text of this source. A
        view that no pass trains has no means.
        """
        learning = {one.view for one in self._plan}
        units, (*sums, count) = self._bundle.objective.units, all_reduce_(self._sums)
        known = [
            n or u not in SOURCE_UNITS.values() for n, u in zip(count, units.values(), strict=True)
        ]
        means = ((total / count.clamp(min=1)).tolist() for total in sums)
        return {
            view: dict(compress(zip(units, values, strict=True), known))
            for (view, name), values in zip(self._views.items(), means, strict=True)
            if name in learning
        }


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
        return self.patience is not None and self.misses >= self.patience

    def extend(self) -> None:
        """Let a stage that has stopped continue, because it was given more steps."""
        if self.stopped:
            self.misses = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "misses": self.misses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.misses = state["best"], state["misses"]
