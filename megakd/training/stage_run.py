"""One stage around the training loop: resume, log, evaluate, save, and write the model."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megakd.config.train import learning_rate_schedule, total_steps
from megakd.contract.batch import Batch, Counts, count_units
from megakd.contract.stage import Stage, StageResult, Teacher
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT
from megakd.engine.collectives import all_reduce_, doing, gather, on_main
from megakd.engine.memory import peak_memory_bytes
from megakd.engine.student import device_batch
from megakd.process import signals
from megakd.process.seeding import seed_everything
from megakd.scoring.scorer import few
from megakd.storage.run_folder import RESULT
from megakd.training.assembly import Assembly
from megakd.training.checkpoint import Checkpoints, CheckpointState
from megakd.training.meters import TrainMeter
from megakd.training.progress import Extent, Reporter
from megakd.training.stage_batches import StageExtra, StageParts, row_batches
from megakd.training.stage_evaluation import StageEvaluation
from megakd.training.stage_folder import (
    continue_window,
    length_of,
    may_grow,
    result_text,
)
from megakd.training.stage_model import StageModel
from megakd.training.trainer import Trainer

logger = logging.getLogger(__name__)
_STOP, _WRITING = "stop", "writing"


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


class StageRun:
    """One stage, from its engines, which the constructor builds, to its finished model folder.

    checkpoint: the verified one that the stage goes on from, if there is one.
    """

    def __init__(
        self,
        stage: Stage,
        assembly: Assembly,
        *,
        teachers: Mapping[str, Teacher],
        reporter: Reporter,
        checkpoint: Path | None = None,
    ) -> None:
        self.stage, self.assembly, self.reporter = stage, assembly, reporter
        self.config, self.ranks = assembly.config, assembly.ranks
        self._checkpoint = checkpoint
        self.first_step = stage.window.first if stage.window else 0
        seed_everything(self.config.seed, self.ranks.rank, self.first_step)
        self.student, self.bundle = assembly.student(stage)
        parts = StageParts(stage, assembly, {STUDENT: self.student, **teachers})
        self.extras = extras_of(parts)
        sources = (extra.source() for extra in self.extras)
        source = next((made for made in sources if made is not None), None)
        self.source = source or row_batches(parts, parts.of_model.prepared.encoded)
        window = stage.window
        steps = window.total if window else total_steps(stage.train, self.source.steps_per_epoch)
        self.episode = steps
        self.steps = window.last if window else stage.strategy.episodes * steps
        rate = learning_rate_schedule(stage.train, steps)
        self.saves = stage_checkpoints(stage, assembly)
        self.votes = StepVotes(
            {_STOP: lambda: signals.requested() > 0, _WRITING: lambda: self.saves.is_writing}
        )
        self.trainer = Trainer(
            student=self.student,
            teachers=teachers,
            strategy=stage.strategy,
            count_units=lambda batches: self.votes.sum_counts(
                count_units(batches, self.bundle.counters)
            ),
            learning_rate=lambda step: rate(step % steps),
            step=self.first_step,
        )
        self.model = StageModel(stage, assembly, self.student, self.bundle, self.source)
        self.evaluation = StageEvaluation(self.model, self.trainer, self.saves.folder, self.extras)
        self.health = TrainMeter(
            self.bundle.objective,
            self.trainer,
            stage,
            self.ranks,
            divides_rows=self.config.method.routes_rows,
        )
        stateful = {"trainer": self.trainer, "batches": self.source, "health": self.health}
        states = {n: CheckpointState(p.state_dict, p.load_state_dict) for n, p in stateful.items()}
        self.states = {**states, **self.evaluation.states}  # in the order of loading

    def run(self, folder: Path) -> StageResult:
        """Train the remaining steps and write the model folder; a collective."""
        with doing(f"loading stage {self.stage.name}"):
            start = self._resume()
        # On rank 0; a full disk there is an error on all ranks.
        on_main(lambda: self.reporter.begin(self.stage.name, self.extent(start)))
        self.stage.strategy.begin(self.student, start)
        self.health.begin()
        if start == 0:
            self._tell_kept_layers()
        if start == 0 and self.stage.measures_losses and not self.stage.views:
            self._evaluate(0)
        training = doing(f"training stage {self.stage.name}")
        with training, signals.deferred(), closing(self.take_steps(start)) as steps:
            deque(steps, maxlen=0)
        return self._finish(folder)

    def take_steps(self, start: int) -> Generator[None, None, None]:
        """Take each step that is left after `start`; log, evaluate and save where it is due."""
        log, save = self.config.log.logging_steps, self.config.save.save_steps
        strategy, stopping = self.stage.strategy, self.evaluation.stopping
        with closing(self.batches(start)) as every:
            for batches in every:
                step = self.trainer.step
                if step > start and step % self.episode == 0:
                    strategy.begin(self.student, step)
                report = self.trainer.train_step(batches)
                step += 1
                self.health.add(report)
                self.reporter.advance(step)
                if self.saves.is_pending and not self.votes.any(_WRITING):
                    with self.health.paused():
                        self.saves.publish()
                is_last = step == self.steps
                if is_last or _due(step, log):
                    self._log(step)
                if is_last or _due(step, self.config.eval.eval_steps):
                    self._evaluate(step)
                if stopping.stopped and not is_last:
                    self._tell_early_stop(step)
                    is_last = True
                is_told = self.votes.any(_STOP)
                if is_last or is_told or _due(step, save):
                    self._save(step, is_last=is_last or is_told)
                # A signal in the last step may be too late for the vote.
                number = agreed_signal() if is_told or is_last else 0
                if number:
                    raise signals.stopped(number, f"{self.stage.name} saved at step {step}")
                yield
                if is_last:
                    return

    def _finish(self, folder: Path) -> StageResult:
        kept = self.evaluation.returned()
        result = StageResult(
            name=self.stage.name,
            folder=folder,
            metrics=kept.evaluation.metrics,
            steps=self.trainer.step - self.first_step,
            seconds=self.health.elapsed_seconds(),
            tokens_per_second=self.health.tokens_per_second(),
            peak_memory_bytes=max(gather(peak_memory_bytes(self.ranks.device))),
            scores=kept.chosen.scores if self.stage.views else {},
            view=kept.chosen.view if self.stage.views else None,
        )
        text = result_text(result, self.saves.length)
        self.model.write_returned(folder, {RESULT: text, **self.stage.strategy.files()}, kept)
        on_main(self.saves.finish)
        return result

    def _tell_kept_layers(self) -> None:
        kept = self.assembly.learners(self.stage)[self.stage.role].layers
        if kept is None or self.config.task.type not in LANGUAGE_TASKS:
            return
        prepared = self.assembly.of(self.stage.role).prepared
        rows = few(prepared.encoded.validation, self.config.task.type)
        predict = self.student.predict
        loss, guess = self.evaluation.scorer.loss(predict, rows), math.log(len(prepared.tokenizer))
        text = f"{self.stage.name}: the loss of the layers {', '.join(map(str, kept))} before the "
        text += f"first step is {loss:.3f} nats"
        if loss > guess:
            text += f", above the {guess:.2f} of guessing uniformly; keep more layers, or choose "
            text += "them by importance (student.layers)"
        self._say(text, logging.WARNING if loss > guess else logging.INFO)

    def extent(self, step: int) -> Extent:
        return Extent(
            step=step, total_steps=self.steps, steps_per_epoch=self.source.steps_per_epoch
        )

    def batches(self, start: int) -> Generator[Sequence[Batch], None, None]:
        """Yield the micro-batches of each step that is left after `start`, on the device."""
        # A stage that had stopped early before it was killed has no step left.
        stop = start if self.evaluation.stopping.stopped else self.steps
        with closing(self.source.iterate(start, stop)) as steps:
            for batches in steps:
                yield [device_batch(batch, self.ranks.device) for batch in batches]

    def _resume(self) -> int:
        name, checkpoint = self.stage.name, self._checkpoint
        if checkpoint is not None:
            writers, has_grown = self.saves.load(checkpoint, self._load_engine, self.states)
            if has_grown:
                self.evaluation.stopping.extend()
            step, ranks = self.trainer.step, self.ranks
            text = f"{name}: resumed at step {step} from {checkpoint}"
            if writers != ranks.world_size:
                seed_everything(self.config.seed, ranks.rank, step)
                text += f", which {writers} ranks wrote; with {ranks.world_size} ranks, dropout "
                text += "draws other numbers from here on"
            self._say(text)
            return step
        self.evaluation.best.load_state_dict({})
        if self.first_step:
            previous: Path = self.stage.start.folder
            self._say(f"{name}: continues from {previous.name} at step {self.first_step}")
            continue_window(previous, self.student, self.stage.strategy, self.source, self.ranks)
        else:
            self._say(f"{name}: no checkpoint to resume from, starting at step 0")
        return self.first_step

    def _load_engine(self, folder: Path) -> None:
        self.stage.strategy.load_shards(self.student.load(folder))

    def _tell_early_stop(self, step: int) -> None:
        if not _due(step, self.config.log.logging_steps):
            self._log(step)
        self._say(
            f"{self.stage.name}: stopped at step {step} of {self.steps}, because "
            f"{self.evaluation.stopping.misses} evaluations in a row were not better "
            "(train.early_stopping_patience)"
        )

    def _log(self, step: int) -> None:
        self.health.check_finite(self._newest)
        scalars = self.health.scalars(waited_s=self.source.waited_s)
        scalars |= self.source.scalars()
        self._report(step, {**scalars, **self.stage.strategy.scalars()})

    def _report(self, step: int, scalars: Mapping[str, float]) -> None:
        on_main(lambda: self.reporter.log(step, scalars, stage=self.stage.name))

    def _evaluate(self, step: int) -> None:
        self.health.check_finite(self._newest)
        with self.health.paused(), doing(f"scoring stage {self.stage.name} at step {step}"):
            self.evaluation.evaluate(step, partial(self._report, step))

    def _save(self, step: int, *, is_last: bool) -> None:
        self.health.check_finite(self._newest)
        with self.health.paused(), doing(f"saving step {step} of stage {self.stage.name}"):
            engine = self.student.files(self.stage.strategy.shards())
            self.saves.save(step, engine, self.states, is_last=is_last)

    def _newest(self) -> Path | None:
        self.saves.publish()
        return on_main(self.saves.newest)

    def _say(self, text: str, level: int = logging.INFO) -> None:
        if self.ranks.is_main:
            logger.log(level, text)

    def close(self) -> None:
        self.saves.close()
        self.student.destroy()


def extras_of(parts: StageParts) -> list[StageExtra]:
    """Return the features that a stage and the config of its run ask for; a collective."""
    stage, generation = parts.stage, parts.assembly.config.eval.generation
    extras: list[StageExtra] = []
    if stage.rollouts is not None:
        from megakd.training.generated_texts import Rollouts

        extras.append(Rollouts(parts))
    extras.extend(parts.assembly.config.method.extras(parts))
    if generation is not None and stage.role == STUDENT and not stage.views:
        from megakd.training.generated_texts import Texts

        extras.append(Texts(parts, generation))
    return extras


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
