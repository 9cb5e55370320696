"""megakd's side of `speed.causal_step`: a stage as `train.py` runs it, on texts or on chats."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import cast

from torch import Tensor
from transformers import LlamaForCausalLM

from lib.stages import MeasuredStage, measured_stage
from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.contract.batch import IGNORE
from megakd.data.loader import StepLoader
from megakd.engine.distributed import Ranks
from megakd.engine.student import device_batch
from megakd.losses.objective import WEIGHTED_LOSS
from megakd.run.main import started
from megakd.teachers.frozen import FrozenTeacher
from speed.causal_bare import CHAT, RUN, Bare, Loss, Models, plain_copy


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
        batch, plan = self.batches[index], self._stage.stage.strategy.passes(0)
        knowledge = self._stage.trainer.ask_teachers(plan, batch)
        losses = self._stage.student.measure(batch, knowledge, plan)
        return float(losses.parts[WEIGHTED_LOSS] / (batch.labels != IGNORE).sum())

    def bare(self, loss: Loss) -> Bare:
        """Return a bare loop that starts from the same weights and sees the same batches."""
        teacher = cast("LlamaForCausalLM", self._teacher.model)
        return Bare(Models(plain_copy(self.student), plain_copy(teacher)), self.ids, loss)

    @property
    def student(self) -> LlamaForCausalLM:
        return self._stage.student.student

    @property
    def ids(self) -> list[Tensor]:
        """The token numbers [B, T] of all batches."""
        return [batch.inputs["input_ids"] for batch in self.batches]

    @property
    def targets(self) -> int:
        """The positions of a batch whose next token counts; the same number in every batch."""
        (count,) = {int((batch.labels != IGNORE).sum()) for batch in self.batches}
        return count

    def close(self) -> None:
        """End the loader's thread."""
        self._steps.close()


@contextmanager
def opened(case: Path, count: int) -> Iterator[Megakd]:
    config = load_config(case / RUN)
    with started(config) as ranks, running(config, ranks, count) as side:
        yield side


@contextmanager
def opened_chat(case: Path, count: int) -> Iterator[tuple[Megakd, Megakd]]:
    configs = [load_config(folder / RUN) for folder in (case / CHAT, case)]
    with started(configs[0]) as ranks, ExitStack() as stack:
        chat, text = (stack.enter_context(running(config, ranks, count)) for config in configs)
        check_same_tokens(chat.ids, text.ids)
        print(f"targets of a step: {chat.targets} in chat, {text.targets} in text", flush=True)
        yield chat, text


def check_same_tokens(chat: list[Tensor], text: list[Tensor]) -> None:
    if any(not ours.equal(theirs) for ours, theirs in zip(chat, text, strict=True)):
        raise ValueError("the batches of chat rows do not have the tokens of the text rows")


@contextmanager
def running(config: RunConfig, ranks: Ranks, count: int) -> Iterator[Megakd]:
    """Build the engines of a run, with so many batches, and free them at the end."""
    with (
        measured_stage(config, ranks) as (stage, teacher),
        closing(Megakd(stage, teacher, count)) as side,
    ):
        yield side
