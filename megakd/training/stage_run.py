"""One stage around the training loop: resume, log, evaluate, save, and write the model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from megakd.config.stage_schedule import learning_rate_schedule, total_steps
from megakd.contract.batch import Batch, Counts, Predictions
from megakd.contract.metrics import WHOLE, MetricJudge
from megakd.contract.stage import Stage, StageResult, StepReport, Teacher
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT
from megakd.contract.unit_counts import count_units
from megakd.contract.views import Cut
from megakd.engine.activity import doing
from megakd.engine.collectives import gather, on_main, together
from megakd.engine.memory import peak_memory_bytes
from megakd.engine.stop_vote import StopVote, agreed_signal
from megakd.engine.student import StudentEngine, device_batch
from megakd.models.learned import Learned
from megakd.process import signals
from megakd.rollouts.evaluation import Watch
from megakd.scoring.evaluation import Evaluation
from megakd.scoring.scorer import few
from megakd.storage import atomic
from megakd.storage.fingerprint import Fingerprint
from megakd.storage.folders import copy_finished
from megakd.teachers.watched import WatchedTeacher
from megakd.training.best_checkpoint import (
    RECORD,
    BestCheckpoints,
    adapters_put_back,
    write_best_adapters,
)
from megakd.training.checkpoint import Checkpoints
from megakd.training.early_stopping import EarlyStopping
from megakd.training.engines import Assembly
from megakd.training.generated_texts import text_evaluation
from megakd.training.held_out import HeldOutLosses
from megakd.training.meters import TrainMeter
from megakd.training.probe import take_beginning
from megakd.training.progress import Extent, Reporter
from megakd.training.random_state import seed_everything
from megakd.training.stage_batches import stage_batches
from megakd.training.stage_folder import RESULT, consume, may_grow, result_text, write_stage_folder
from megakd.training.trainer import Trainer
from megakd.training.window_state import WindowState, continue_window

logger = logging.getLogger(__name__)


class StageRun:
    """One stage, from its engines to its finished model folder.

    The constructor builds the engines, and `close` frees them.
    """

    def __init__(
        self,
        stage: Stage,
        assembly: Assembly,
        *,
        teachers: Mapping[str, Teacher],
        reporter: Reporter,
        fingerprint: Fingerprint,
    ) -> None:
        self.stage, self.assembly, self.reporter = stage, assembly, reporter
        own = assembly.of(stage.role)
        self.config, self.prepared, self.ranks = assembly.config, own.prepared, assembly.ranks
        self.first_step = stage.window.first if stage.window else 0
        seed_everything(self.config.seed, self.ranks.rank, self.first_step)
        self.student: StudentEngine
        self.student, self.bundle = assembly.student(stage)
        self.scorer = own.scorer(stage.train)
        models = {STUDENT: self.student, **teachers}
        self.source = stage_batches(stage, assembly, models, fingerprint)
        self.texts = text_evaluation(stage, assembly, self.student)
        train = stage.train
        steps = stage.window.total if stage.window else self._steps_of_train()
        self.steps = stage.window.last if stage.window else stage.strategy.episodes * steps
        rate = learning_rate_schedule(train, steps)
        self.stop_vote = StopVote()
        self.trainer = Trainer(
            student=self.student,
            teachers={name: WatchedTeacher(teacher) for name, teacher in teachers.items()},
            strategy=stage.strategy,
            count_units=self._count_units,
            learning_rate=lambda step: rate(step % steps),
            step=self.first_step,
        )
        self.checkpoints = stage_checkpoints(stage, assembly, fingerprint)
        folder = self.checkpoints.folder
        self.best = BestCheckpoints(folder, self._write_best, tuple(stage.views))
        self.judge = stage.judge or MetricJudge(self.prepared.metric)
        self.evaluation = Evaluation({}, None)
        self.stopping = EarlyStopping(
            patience=train.early_stopping_patience, threshold=train.early_stopping_threshold
        )
        self.health = TrainMeter(self.bundle.objective, self.trainer, stage, self.ranks)

    def _steps_of_train(self) -> int:
        return total_steps(self.stage.train, self.source.steps_per_epoch)

    def _count_units(self, batches: Sequence[Batch]) -> Counts:
        return self.stop_vote.sum_counts(count_units(batches, self.bundle.counters))

    @property
    def keeps_best(self) -> bool:
        """True if the stage returns the best evaluation instead of the last step."""
        if self.goes_on:
            return False
        wanted = self.config.eval.keep_best
        return self.config.eval.eval_steps is not None if wanted is None else wanted

    @property
    def goes_on(self) -> bool:
        """True if another window of the run follows: the stage returns its last step."""
        return self.stage.window is not None and self.stage.window.last < self.stage.window.total

    def run(self, folder: Path) -> StageResult:
        """Train the remaining steps and write the model folder; a collective.

        Raises:
            MegakdError: the loss is not finite, or a checkpoint cannot be read or written.
        """
        with doing(f"loading stage {self.stage.name}"):
            start = self._resume()
        # On rank 0; a full disk there is an error on all ranks.
        on_main(lambda: self.reporter.begin(self.stage.name, self.extent(start)))
        self.trainer.strategy.begin(self.student, start)
        self.health.begin()
        if start == 0:
            self._tell_kept_layers()
        if start == 0 and self.stage.measures_losses:
            self._evaluate(0)
        training = doing(f"training stage {self.stage.name}")
        with training, signals.deferred(), closing(self._on_device(start)) as steps:
            for report in self.trainer.fit(steps):
                self._after_step(report)
                if self.stopping.stopped:
                    break
        kept = self.best.kept() if self.keeps_best else None
        chosen = kept.chosen if kept else self.evaluation
        result = StageResult(
            name=self.stage.name,
            folder=folder,
            metrics=(kept.evaluation if kept else chosen).metrics,
            steps=self.trainer.step - self.first_step,
            seconds=self.health.elapsed_seconds(),
            tokens_per_second=self.health.tokens_per_second(),
            peak_memory_bytes=max(gather(peak_memory_bytes(self.ranks.device))),
            scores=chosen.scores if self.stage.views else {},
            view=chosen.view if self.stage.views else None,
        )
        self._write_result(result, chosen, best=kept.folder if kept else None)
        on_main(self.checkpoints.finish)
        return result

    def _tell_kept_layers(self) -> None:
        """Log the loss of a language model made of some layers; warn if guessing is better."""
        kept = self.assembly.learners(self.stage)[self.stage.role].layers
        if kept is None or self.config.task.type not in LANGUAGE_TASKS:
            return
        loss = self.scorer.loss(self.student.predict, few(self.prepared.encoded.validation))
        guess = math.log(len(self.prepared.tokenizer))
        text = f"{self.stage.name}: the loss of the layers {', '.join(map(str, kept))} before the "
        text += f"first step is {loss:.3f} nats"
        if loss > guess:
            text += f", above the {guess:.2f} of guessing uniformly; keep more layers, or choose "
            text += "them by importance (student.layers)"
        self._say(text, logging.WARNING if loss > guess else logging.INFO)

    def extent(self, step: int) -> Extent:
        """Return the length of the stage at a start from `step`, for its log."""
        return Extent(
            step=step, total_steps=self.steps, steps_per_epoch=self.source.steps_per_epoch
        )

    def _on_device(self, start: int) -> Generator[Sequence[Batch], None, None]:
        # A stage that had stopped early before it was killed has no step left.
        stop = start if self.stopping.stopped else self.steps
        with closing(self.source.iterate(start, stop)) as steps:
            for batches in steps:
                yield [device_batch(batch, self.ranks.device) for batch in batches]

    def _resume(self) -> int:
        checkpoint = self.checkpoints.to_resume(self.stage.train.resume_from_checkpoint)
        if checkpoint is None:
            return self._begin()
        on_main(lambda: take_beginning(checkpoint.parent, self.checkpoints.folder))
        state, own = self.checkpoints.load(checkpoint, self.student.load)
        self.trainer.strategy.load_shards(own["shards"])
        self.trainer.load_state_dict(state["trainer"])
        self.source.load_state_dict(state["batches"])
        self.health.load_state_dict(state["health"])
        self.health.load_window_state(own["window"])
        self.evaluation = Evaluation.read(state["evaluation"])
        self.stopping.load_state_dict(state["early_stopping"])
        if self.checkpoints.has_grown(checkpoint):
            self.stopping.extend()
        step = self.trainer.step
        self._say(f"{self.stage.name}: resumed at step {step} from {checkpoint}")
        self.best.resume(step, state["best_steps"])
        return step

    def _begin(self) -> int:
        name, first, strategy = self.stage.name, self.first_step, self.trainer.strategy
        self.best.resume(first, {})
        if first:
            previous = self._previous()
            self._say(f"{name}: continues from {previous.name} at step {first}")
            continue_window(previous, self.student, strategy, self.source, self.ranks)
        elif self.stage.train.resume_from_checkpoint is True:
            self._say(f"{name}: no checkpoint to resume from, starting at step 0")
        return first

    def _previous(self) -> Path:
        folder = getattr(self.stage.start, "folder", None)
        if folder is None:
            raise TypeError(
                f"{self.stage.name}: a window from step {self.first_step} needs `start`, the model "
                "of the previous window's stage"
            )
        return folder

    def _after_step(self, report: StepReport) -> None:
        step = self.trainer.step
        self.health.add(report)
        self.reporter.advance(step)
        last = step == self.steps
        if last or _due(step, self.config.log.logging_steps):
            self._log(step)
        if last or _due(step, self.config.eval.eval_steps):
            self._evaluate(step)
        if self.stopping.stopped and not last:
            self._stop_early(step)
        last = last or self.stopping.stopped
        is_told = self.stop_vote.passed()
        if last or is_told or _due(step, self.config.save.save_steps):
            self._save(step)
        # A signal in the last step may be too late for the vote.
        number = agreed_signal() if is_told or last else 0
        if number:
            raise signals.stopped(number, f"{self.stage.name} saved at step {step}")

    def _stop_early(self, step: int) -> None:
        """Log the steps since the last logging step, as at the end of any stage."""
        if not _due(step, self.config.log.logging_steps):
            self._log(step)
        self._say(
            f"{self.stage.name}: stopped at step {step} of {self.steps}, because "
            f"{self.stopping.misses} evaluations in a row were not better "
            "(train.early_stopping_patience)"
        )

    def _log(self, step: int) -> None:
        self.health.check_finite(self.checkpoints.newest)
        scalars = self.health.scalars(waited_s=self.source.waited_s)
        scalars |= self.source.scalars()
        self._report(step, {**scalars, **self.trainer.strategy.scalars()})

    def _report(self, step: int, scalars: Mapping[str, float]) -> None:
        on_main(lambda: self.reporter.log(step, scalars, stage=self.stage.name))

    def _evaluate(self, step: int) -> None:
        self.health.check_finite(self.checkpoints.newest)
        with self.health.paused(), doing(f"scoring stage {self.stage.name} at step {step}"):
            scores = self._scores()
            verdict = self.judge(scores, step)
            self.evaluation = Evaluation(scores, verdict.view, verdict.cut)
            curves = {} if self.texts is None else self.texts.by_position
            self._report(step, {**self.evaluation.scalars(), **curves})
            if verdict.counts and not self.goes_on:
                self.stopping.consider(verdict.score)
            if self.keeps_best:
                self.best.consider(step, scores, verdict)

    def _scores(self) -> dict[str, dict[str, float]]:
        views = tuple(self.stage.views) or (WHOLE,)
        predict, losses = self._predictions, None
        if self.stage.measures_losses:
            plan = self.trainer.strategy.passes(self.trainer.step)
            losses = HeldOutLosses(self.trainer, self.bundle, plan, views)
            predict = losses.add  # scores and losses come out of one forward
        scored = self.scorer.scored_views(predict, self.prepared.encoded.validation)
        means = {} if losses is None else losses.means()
        scores = {view: scored[view].metrics | means.get(view, {}) for view in views}
        if self.texts is not None and WHOLE in scores:
            # A routed stage compares a row with its own teacher, and held-out rows name none.
            of_texts = None if self.stage.strategy.routes_rows else self._losses_of_texts
            scores[WHOLE] |= self.texts.scores(self.trainer.step, of_texts)
        return scores

    def _predictions(self, batch: Batch) -> dict[str, Predictions]:
        predict, views = self.student.predict, self.stage.views
        # One view at a time: their outputs need not fit into memory together.
        return {view: predict(batch, view) for view in views} or {WHOLE: predict(batch)}

    def _losses_of_texts(self, batches: Iterable[Batch], watch: Watch) -> Mapping[str, float]:
        plan = watch(self.trainer.strategy.passes(self.trainer.step))
        losses = HeldOutLosses(self.trainer, self.bundle, plan)
        for batch in batches:
            losses.add(batch, predicts=False)
        return losses.means()[WHOLE]

    def _save(self, step: int) -> None:
        self.health.check_finite(self.checkpoints.newest)
        with self.health.paused(), self._saving(step):
            state = {
                "trainer": self.trainer.state_dict(),
                "batches": self.source.state_dict(),
                "health": self.health.state_dict(),
                "evaluation": self.evaluation.record(),
                "early_stopping": self.stopping.state_dict(),
                "best_steps": self.best.steps(),
            }
            shards = self.trainer.strategy.shards()
            own = {
                "window": self.health.window_state(),
                "shards": {kind: dict(parts) for kind, parts in shards.items()},
            }
            self.checkpoints.save(step, self.student.save, state, own)

    @contextmanager
    def _saving(self, step: int) -> Iterator[None]:
        """Name the activity, and warn if the limit of collectives is too low for a save."""
        began = time.perf_counter()
        with doing(f"saving step {step} of stage {self.stage.name}"):
            yield
        seconds, limit = time.perf_counter() - began, self.config.train.collective_timeout
        if seconds > limit / 2 and self.ranks.is_main:
            logger.warning(
                "%s: saving step %d took %.1f s, and train.collective_timeout is %g s; ranks "
                "write at different speeds, so set it to %.0f or more",
                self.stage.name,
                step,
                seconds,
                limit,
                10 * seconds,
            )

    def _write_result(
        self, result: StageResult, evaluation: Evaluation, *, best: Path | None
    ) -> None:
        record = {
            RESULT: result_text(result, self.checkpoints.fingerprint),
            **self.trainer.strategy.files(),
        }
        if best is None or adapters_put_back(self.bundle.student, best):
            self._write_model(result.folder, record, evaluation, goes_on=self.goes_on)
        else:
            remedy = f"remove {best} and start the same command again"
            on_main(lambda: copy_finished(best, result.folder, changes=record, remedy=remedy))

    def _write_best(self, folder: Path, record: Mapping[str, Any]) -> None:
        text = atomic.json_text(record, indent=2)
        if not write_best_adapters(folder, self.bundle.student, {RECORD: text}):
            self._write_model(folder, {RECORD: text}, Evaluation.read(record["evaluation"]))

    def _write_model(
        self,
        folder: Path,
        extra: Mapping[str, str | bytes],
        evaluation: Evaluation,
        *,
        goes_on: bool = False,
    ) -> None:
        """Write the learners, the first cut as an evaluation says, and small files; collective."""
        view = self.stage.views.get(evaluation.view or "")
        cut = evaluation.cut or (None if view is None else Cut(None, view))
        first, *beside = self.bundle.learners
        of_role = self.assembly.prepared.tokenizer_of
        role = self.stage.role
        models = {role: Learned.of(first, of_role(role), cut=cut, learns=goes_on)}
        for name, model in zip(self.stage.beside, beside, strict=True):
            models[name] = Learned.of(model, of_role(name))
        window = self._window_state(cut) if goes_on else None

        def write() -> None:
            if self.ranks.is_main:
                write_stage_folder(folder, models, extra=extra, window=window)
            else:
                consume(models, window)

        together(write)

    def _window_state(self, cut: Cut | None) -> WindowState:
        strategy, axes = self.trainer.strategy, self.bundle.axes
        return WindowState.of(self.student, strategy, self.source, axes=axes, cut=cut)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        if self.ranks.is_main:
            logger.log(level, text)

    def close(self) -> None:
        """Free the engine."""
        self.student.destroy()


def stage_checkpoints(stage: Stage, assembly: Assembly, fingerprint: Fingerprint) -> Checkpoints:
    """Return the checkpoints of a stage."""
    config = assembly.config
    return Checkpoints(
        folder=config.output_dir / "checkpoints" / stage.name,
        fingerprint=fingerprint,
        keep=config.save.save_total_limit,
        ranks=assembly.ranks,
        may_grow=may_grow(stage.name, config),
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
