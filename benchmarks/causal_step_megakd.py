"""megakd's side of `causal_step.py`: a stage as `train.py` runs it."""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, cast

from causal_step_bare import Bare, Models, plain_copy
from causal_step_case import RUN
from overhead import MeasuredStage, build

from megakd.config.file import load_config
from megakd.contract.batch import IGNORE
from megakd.engine.student import device_batch
from megakd.losses.objective import WEIGHTED_LOSS
from megakd.run.main import started

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from causal_step_bare import Loss
    from torch import Tensor
    from transformers import LlamaForCausalLM

    from megakd.config.run import RunConfig
    from megakd.data.loader import StepLoader
    from megakd.engine.distributed import Ranks
    from megakd.teachers.frozen import FrozenTeacher


class Megakd:
    """A stage with its loader, its teacher, its meters and its log."""

    def __init__(self, stage: MeasuredStage, teacher: FrozenTeacher, count: int) -> None:
        self._stage, self._teacher = stage, teacher
        loader = cast("StepLoader", stage.source)
        batches = (loader.step(index)[0] for index in range(count))
        self.batches = [device_batch(batch, stage.ranks.device) for batch in batches]
        self._steps = cast("Generator[None]", stage.steps_one_by_one())

    def step(self, index: int) -> None:
        """Take the stage's next step; the loader's thread has long finished at its end."""
        del index  # the stage counts its own steps
        next(self._steps)

    def loss(self, index: int) -> float:
        """Return the objective on a batch in nats per target, without learning."""
        batch, plan = self.batches[index], self._stage.stage.strategy.passes(0)
        knowledge = self._stage.trainer.ask_teachers(plan, batch)
        losses = self._stage.student.measure(batch, knowledge, plan)
        return float(losses.parts[WEIGHTED_LOSS] / (batch.labels != IGNORE).sum())

    def bare(self, loss: Loss) -> Bare:
        """Return a bare loop that starts from the same weights and sees the same batches."""
        teacher = cast("LlamaForCausalLM", self._teacher.model)
        models = Models(plain_copy(self.student), plain_copy(teacher))
        return Bare(models, self.ids, loss)

    @property
    def student(self) -> LlamaForCausalLM:
        """The model that learns."""
        return self._stage.student.student

    @property
    def ids(self) -> list[Tensor]:
        """The token numbers [B, T] of all batches."""
        return [batch.inputs["input_ids"] for batch in self.batches]

    @property
    def targets(self) -> int:
        """The positions of a batch whose next token counts; the same number in every batch."""
        (found,) = {int((batch.labels != IGNORE).sum()) for batch in self.batches}
        return found

    def close(self) -> None:
        """End the loader's thread."""
        self._steps.close()


@contextmanager
def opened(case: Path, count: int) -> Iterator[Megakd]:
    """Build the engines of the case's run, and free them at the end."""
    config = load_config(case / RUN)
    with started(config) as ranks, running(config, ranks, count) as side:
        yield side


@contextmanager
def running(config: RunConfig, ranks: Ranks, count: int) -> Iterator[Megakd]:
    """Build the engines of a run, with so many batches, and free them at the end."""
    stage, teacher = build(config, ranks)
    try:
        with closing(Megakd(stage, teacher, count)) as side:
            yield side
    finally:
        stage.close()
        teacher.destroy()
