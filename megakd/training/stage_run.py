"""One stage: built, trained step by step, and written as a model folder; see `run_stage`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from megakd.config.sections import learning_rate_schedule, total_steps
from megakd.config.task import LANGUAGE_TASKS, STUDENT
from megakd.data.batch import Batch, BatchSource, Counts, Teacher, count_units
from megakd.data.chat_tokens import learned_ends
from megakd.engine.collectives import activity, all_reduce_, gather, on_main, raise_on_all
from megakd.engine.memory import peak_memory_bytes
from megakd.models.cutting import content_of
from megakd.models.end_tokens import generation_file
from megakd.models.lora import adapter_files, load_adapters
from megakd.models.thresholds import store_threshold
from megakd.models.views import Cut
from megakd.process import signals
from megakd.process.record import RESULT
from megakd.process.seals import copy_finished, write_finished
from megakd.process.seeding import seed_everything
from megakd.stage import WHOLE, MetricJudge, Stage, StageResult
from megakd.training.assembly import Assembly
from megakd.training.batches import StageParts, row_batches
from megakd.training.best import Best, Evaluation
from megakd.training.checkpoint import Checkpoints
from megakd.training.evaluation import HeldOutLosses, few, scorer_for
from megakd.training.lab import Files
from megakd.training.learners import learner_sources, student_engine
from megakd.training.log import Reporter
from megakd.training.meter import TrainMeter
from megakd.training.stage_folder import (
    WindowState,
    consume,
    continue_window,
    length_of,
    may_grow,
    result_text,
    write_stage_folder,
)
from megakd.training.student import device_batch
from megakd.training.trainer import Trainer

logger = logging.getLogger(__name__)
STOP, WRITING, SAVE = "stop", "writing", "save"
"""Questions of `StepVotes`."""


def run_stage(
    stage: Stage,
    assembly: Assembly,
    *,
    teachers: Mapping[str, Teacher],
    reporter: Reporter,
    checkpoint: Path | None,
    files: Files = dict,
) -> StageResult:
    """Build a stage, train the steps that are left, and write its model; a collective.

    `checkpoint`: the verified one that the stage goes on from, if there is one. `files`: as in
    `Lab.train`.
    """
    config, strategy = assembly.config, stage.strategy
    with closing(StageRun(stage, assembly, teachers=teachers)) as run:
        with activity(f"loading stage {stage.name}"):
            start = step = run.resume(checkpoint)
        run.prepare(start, reporter)
        training = activity(f"training stage {stage.name}")
        with training, signals.deferred(), closing(run.batches(start)) as every:
            for batches in every:
                if step > start and step % run.steps_per_round == 0:  # a window of several rounds
                    strategy.begin(run.student, step)
                run.meter.add(run.trainer.train_step(batches))
                step += 1
                reporter.advance(step)
                run.publish_written()
                ends = step == run.last_step
                if ends or _due(step, config.log.logging_steps):
                    run.log(step, reporter)
                if ends or _due(step, config.eval.eval_steps):
                    run.evaluate(step, reporter)
                if run.best.is_stale and not ends:
                    run.end_early(step, reporter)
                    ends = True
                stops = run.votes.any(STOP)
                is_due = _due(step, config.save.save_steps) or run.votes.any(SAVE)
                if ends or stops or is_due:
                    run.save(step, is_last=ends or stops)
                # A signal in the last step may be too late for the vote.
                if (ends or stops) and (number := agreed_signal()):
                    raise signals.stopped(number, f"{stage.name} saved at step {step}")
                if ends:
                    break
        return run.write(files)


class StageRun:
    """The parts of one stage that trains: its engine, its batches, and the state of its loop."""

    def __init__(
        self, stage: Stage, assembly: Assembly, *, teachers: Mapping[str, Teacher]
    ) -> None:
        self.stage, self.assembly = stage, assembly
        self.config, self.ranks = assembly.config, assembly.ranks
        window, prepared = stage.window, assembly.for_role(stage.role).prepared
        self.first_step = window.first if window else 0
        seed_everything(self.config.seed, self.ranks.rank, self.first_step)
        self.learner_sources = learner_sources(assembly, stage)
        self._has_adapters = self.config.lora_of(stage.role) is not None
        self.student, self.bundle = student_engine(assembly, stage)
        parts = StageParts(stage, assembly, {STUDENT: self.student, **teachers})
        self.batch_source = batches_of(parts)
        self._texts, generation = None, self.config.eval.generation
        if generation is not None and stage.role == STUDENT and not stage.views:
            from megakd.training.generated_texts import text_evaluation

            self._texts = text_evaluation(parts, generation)
        # The steps until the rate begins again, and the number of the last step.
        self.steps_per_round = steps = (
            window.total if window else total_steps(stage.train, self.batch_source.steps_per_epoch)
        )
        self.last_step = window.last if window else steps
        rate = learning_rate_schedule(stage.train, steps)
        self.saves, self._saved_at = stage_checkpoints(stage, assembly), monotonic()
        self.votes = StepVotes(
            {
                STOP: lambda: signals.requested() > 0,
                WRITING: lambda: self.saves.is_writing,
                SAVE: lambda: monotonic() - self._saved_at >= self.config.save.seconds,
            }
        )
        self.trainer = Trainer(
            student=self.student,
            teachers=teachers,
            strategy=stage.strategy,
            sum_counts=lambda batches: self.votes.sum_counts(
                count_units(batches, self.bundle.counters)
            ),
            learning_rate=lambda step: rate(step % steps),
            step=self.first_step,
        )
        self._rows, self.scorer = (
            prepared.encoded.validation,
            scorer_for(parts.of_model, stage.train),
        )
        self._judge = stage.judge or MetricJudge(prepared.metric)
        keeps, every = self.config.eval.keep_best, self.config.eval.eval_steps
        self.best = Best(
            self.saves.folder,
            self._write_best,
            tuple(stage.views),
            keeps=not stage.has_next_window and (every is not None if keeps is None else keeps),
            patience=None if stage.has_next_window else stage.train.early_stopping_patience,
        )
        self.meter = TrainMeter(
            self.bundle.objective,
            self.trainer,
            stage,
            self.ranks,
            divides_rows=self.config.method.routes_rows,
        )
        # In the order of loading; `Checkpoints.load` loads the engine before them, and the random
        # numbers after.
        self._states = {
            "trainer": self.trainer,
            "batches": self.batch_source,
            "meter": self.meter,
            "best": self.best,
        }

    def resume(self, checkpoint: Path | None) -> int:
        """Load the state that the stage goes on with; return the steps that are taken."""
        name, step, ranks = self.stage.name, self.first_step, self.ranks
        if checkpoint is not None:
            writers, has_grown = self.saves.load(checkpoint, self.student.load, self._states)
            if has_grown:
                self.best.extend()
            step = self.trainer.step
            text = f"{name}: resumed at step {step} from {checkpoint}"
            if writers != ranks.world_size:
                seed_everything(self.config.seed, ranks.rank, step)
                text += f", which {writers} ranks wrote, and {ranks.world_size} go on"
                learner = self.learner_sources[self.stage.role]
                is_still = learner.with_dropout(0.0).config.to_dict() == learner.config.to_dict()
                if not is_still or getattr(self.config.student.lora, "dropout", 0):
                    text += "; dropout draws other numbers from here on"
        else:
            self.best.remove()
            if step:
                previous: Path = self.stage.start.folder
                text = f"{name}: continues from {previous.name} at step {step}"
                continue_window(previous, self.student, self.batch_source, ranks)
            else:
                text = f"{name}: no checkpoint to resume from, starting at step 0"
        logger.info(text)
        return step

    def prepare(self, step: int, reporter: Reporter) -> None:
        """Begin the log and the strategy; at a first start, measure the student before it learns.

        `step`: the steps that are taken.
        """
        stage, epoch = self.stage, self.batch_source.steps_per_epoch
        # On rank 0; a full disk there is an error on all ranks.
        on_main(
            lambda: reporter.begin(stage.name, step, last=self.last_step, steps_per_epoch=epoch)
        )
        stage.strategy.begin(self.student, step)
        self.meter.begin()
        if step > 0:
            return
        kept = self.learner_sources[stage.role].layers
        if kept is not None and self.config.task.type in LANGUAGE_TASKS:
            self._log_loss(kept)
        if stage.measured:
            self.evaluate(0, reporter)

    def _log_loss(self, layers: Sequence[int]) -> None:
        loss = self.scorer.loss(self.student.predict, few(self._rows, self.config.task.type))
        guess = math.log(len(self.assembly.for_role(self.stage.role).prepared.tokenizer))
        text = (
            f"{self.stage.name}: the loss of the layers {', '.join(map(str, layers))} before the "
        )
        text += f"first step is {loss:.3f} nats"
        if loss > guess:
            text += f", above the {guess:.2f} of guessing uniformly; keep more layers, or choose "
            text += "them by importance (student.layers)"
        logger.log(logging.WARNING if loss > guess else logging.INFO, text)

    def batches(self, start: int) -> Generator[Sequence[Batch], None, None]:
        """Yield the micro-batches of each step that is left after `start`, on the device."""
        # A stage that had stopped early before it was killed has no step left.
        stop = start if self.best.is_stale else self.last_step
        with closing(self.batch_source.iterate(start, stop)) as steps:
            for batches in steps:
                yield [device_batch(batch, self.ranks.device) for batch in batches]

    def end_early(self, step: int, reporter: Reporter) -> None:
        if not _due(step, self.config.log.logging_steps):
            self.log(step, reporter)
        logger.info(
            "%s: stopped at step %d of %d, because %d evaluations in a row were not better "
            "(train.early_stopping_patience)",
            *(self.stage.name, step, self.last_step, self.best.misses),
        )

    def log(self, step: int, reporter: Reporter) -> None:
        self.meter.check_finite(self._publish_newest)
        scalars = self.meter.scalars(waited_s=self.batch_source.waited_s)
        scalars |= self.batch_source.scalars()
        on_main(lambda: reporter.log(step, scalars))

    def evaluate(self, step: int, reporter: Reporter) -> None:
        """Score the student, report the scores, and keep its weights if they are the best."""
        self.meter.check_finite(self._publish_newest)
        with self.meter.paused(), activity(f"scoring stage {self.stage.name} at step {step}"):
            scores = self._scores()
            verdict = self._judge(scores, step)
            evaluation = Evaluation(scores, verdict.view, verdict.cut)
            on_main(lambda: reporter.log(step, evaluation.scalars()))
            self.best.consider(step, evaluation, verdict)

    def _scores(self) -> dict[str, dict[str, float]]:
        predict, views = self.student.predict, self.stage.views
        if views:
            # One view at a time: their outputs need not fit into memory together.
            return self.scorer.scores(lambda b: {v: predict(b, v) for v in views}, self._rows)
        losses = HeldOutLosses(self.trainer, self.bundle, self.stage.measured)
        # Scores and losses come out of one forward.
        scores = self.scorer.score(losses.add if self.stage.measured else predict, self._rows)
        if self.stage.measured:
            scores |= losses.means()
        if self._texts is not None:
            scores |= self._texts.scores(self.trainer.step)
        return {WHOLE: scores}

    def save(self, step: int, *, is_last: bool) -> None:
        self.meter.check_finite(self._publish_newest)
        with self.meter.paused(), activity(f"saving step {step} of stage {self.stage.name}"):
            self.saves.save(step, self.student.files(), self._states, is_last=is_last)
            self._saved_at = monotonic()

    def publish_written(self) -> None:
        """Give the checkpoint that all ranks have written, if there is one, its name."""
        if self.saves.is_pending and not self.votes.any(WRITING):
            with self.meter.paused():
                self.saves.publish()

    def _publish_newest(self) -> Path | None:
        self.saves.publish()
        return on_main(self.saves.newest)

    def write(self, files: Files) -> StageResult:
        """Write the weights that the stage returns and its result into the stage's folder."""
        stage, (source, chosen, evaluation) = self.stage, self.best.returned()
        folder = self.assembly.stage_folder(stage.name)
        result = StageResult(
            name=stage.name,
            folder=folder,
            meaning=stage.meaning,
            metrics=evaluation.metrics,
            steps=self.trainer.step - self.first_step,
            seconds=self.meter.elapsed_seconds(),
            tokens_per_second=self.meter.tokens_per_second(),
            peak_memory_bytes=max(gather(peak_memory_bytes(self.ranks.device))),
            scores=chosen.scores if stage.views else {},
            view=chosen.view if stage.views else None,
        )
        contents = {RESULT: result_text(result, self.saves.length), **files()}
        if source is not None and self._has_adapters:
            load_adapters(self.bundle.student, source)
            source = None
        if source is None:
            self._write(folder, contents, chosen)
        else:
            remedy = f"remove {source} and start the same command again"
            on_main(lambda: copy_finished(source, folder, changes=contents, remedy=remedy))
        on_main(self.saves.finish)
        return result

    def _write_best(self, folder: Path, evaluation: Evaluation) -> None:
        learner = self.bundle.student
        if not self._has_adapters:
            self._write(folder, {}, evaluation)
        else:
            contents = adapter_files(learner)
            on_main(lambda: write_finished(folder, contents))

    def _write(
        self, folder: Path, contents: Mapping[str, str | bytes], evaluation: Evaluation
    ) -> None:
        stage, role, (first, *beside) = self.stage, self.stage.role, self.bundle.learners
        view = stage.views.get(evaluation.view or "")
        cut = evaluation.cut or (None if view is None else Cut(None, view))
        prepared = self.assembly.prepared
        store_threshold(first.config, evaluation.metrics)
        models = {
            role: content_of(
                first, prepared.tokenizer_of(role), cut=cut, learns=stage.has_next_window
            )
        }
        for name, model in zip(stage.beside, beside, strict=True):
            models[name] = content_of(model, prepared.tokenizer_of(name))
        window = None
        if stage.has_next_window:
            window = WindowState.from_stage(
                self.student, self.batch_source, axes=self.bundle.axes, cut=cut
            )

        def write() -> None:
            if not self.ranks.is_main:
                consume(models, window)
                return
            extra = dict(contents)
            if self.config.task.type == "causal_lm":
                source = self.learner_sources[role]
                ends = learned_ends(prepared.for_role(role).encoded.chat)
                extra = {**generation_file(source, prepared.tokenizer_of(role), ends), **extra}
            write_stage_folder(folder, models, extra=extra, window=window)

        raise_on_all(write)

    def close(self) -> None:
        self.saves.close()
        self.student.destroy()


class StepVotes:
    """Questions that each rank answers in every step; all ranks know if any rank said yes.

    The answers are sent with the unit counts of a step, which are summed over the ranks anyway. The
    sums are copied to the host during the step and read when all its kernels have been launched:
    the accelerator still has the whole step to compute, so that reading causes no idle time.

    questions: by name; each is asked when the counts of a step are summed.
    """

    def __init__(self, questions: Mapping[str, Callable[[], bool]]) -> None:
        self._questions = questions
        self._flags: tuple[Tensor, ...] | None = None
        self._votes: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def sum_counts(self, counts: Counts) -> Counts:
        """Return the counts summed over the ranks, and sum the answers of the ranks with them."""
        device = next(iter(counts.values())).device
        if self._flags is None:  # made once: a step must not copy from the host
            self._flags = torch.tensor([0, 1], device=device).unbind()
        answers = [self._flags[int(ask())] for ask in self._questions.values()]
        sums = all_reduce_(torch.stack([*counts.values(), *answers]))
        self._votes = sums[len(counts) :].to("cpu", non_blocking=True)
        if sums.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return dict(zip(counts, sums.unbind(), strict=False))

    def any(self, name: str) -> bool:
        """Return whether any rank said yes in the last step; False before the first step."""
        if self._votes is None:
            return False
        if self._copied is not None:
            self._copied.synchronize()
        return self._votes[[*self._questions].index(name)].item() > 0


def agreed_signal() -> int:
    """Return the stop signal that any rank has received, or 0; a collective."""
    return max(gather(signals.requested()))


def batches_of(parts: StageParts) -> BatchSource:
    """Return the batches of a stage; a collective."""
    rollouts = parts.assembly.config.rollout
    if rollouts is not None and parts.stage.teachers:  # stages that learn labels read the data
        from megakd.training.generated_texts import rollout_batches

        return rollout_batches(parts, rollouts)
    of_method = parts.assembly.config.method.batches(parts)
    return row_batches(parts, parts.of_model.prepared.encoded) if of_method is None else of_method


def stage_checkpoints(stage: Stage, assembly: Assembly) -> Checkpoints:
    """Return the checkpoints of a stage."""
    config = assembly.config
    return Checkpoints(
        folder=config.output_dir / "checkpoints" / stage.name,
        keep=config.save.save_total_limit,
        ranks=assembly.ranks,
        length=length_of(stage.train),
        may_grow=may_grow(stage, config),
        stays=config.save.keep,
        beside=config.save.asynchronous,
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
