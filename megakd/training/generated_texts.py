"""Generated texts in a stage: its training batches, and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from typing_extensions import override

from megakd.config.rollout import GenerationConfig
from megakd.contract.completions import Generator
from megakd.contract.stage import Teacher
from megakd.contract.tasks import STUDENT, TEXTS
from megakd.data.loader import RowOrder, StepLoader
from megakd.engine.collectives import on_main
from megakd.engine.student import StudentEngine
from megakd.rollouts.batches import RolloutSource, StepRows
from megakd.rollouts.prompts import prompts_of
from megakd.rollouts.store import LocalGenerator, RolloutStore, text_tokens
from megakd.rollouts.text_evaluation import TextEvaluation
from megakd.servers.texts import server_generator
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.assembly import Assembly
from megakd.training.checkpoint import steps_in
from megakd.training.stage_batches import StageExtra, StageParts


class Rollouts(StageExtra):
    """Batches of which some steps learn from generated texts."""

    def __init__(self, parts: StageParts) -> None:
        self._parts, self._generator = parts, generator_of(parts)

    @override
    def source(self) -> RolloutSource:
        parts, config = self._parts, self._parts.assembly.config
        rollouts = parts.stage.rollouts
        of_model, layout = parts.of_model, parts.layout
        train, student = of_model.prepared.encoded.train, of_model.prepared.sources[STUDENT]
        prompts = prompts_of(train, rollouts, config, student)
        collate = of_model.scorer(parts.stage.train).collate
        data = None
        if "data" in rollouts.draws:
            data = StepLoader(train, collate, layout=layout, seed=config.seed)
        store = RolloutStore(config.output_dir / "rollouts" / parts.stage.name)
        if not oldest(parts.checkpoints):  # those of a start that no checkpoint is left of
            on_main(store.clear)
        return RolloutSource(
            StepRows(
                prompts,
                RowOrder(prompts.continued, layout.shape, seed=config.seed),
                data,
                collate,
                layout,
            ),
            rollouts,
            generator=self._generator,
            store=store,
            seed=config.seed,
            oldest=lambda: oldest(parts.checkpoints),
        )


def oldest(folder: Path) -> int:
    """Return the step of the oldest checkpoint of a stage; 0 without one."""
    return min(steps_in(folder), default=0)


def generator_of(parts: StageParts) -> Generator:
    """Return the generator of a stage's texts: a server, or the weights of a model."""
    rollouts, of_model, assembly = parts.stage.rollouts, parts.of_model, parts.assembly
    if rollouts.server is not None:
        student = parts.models[STUDENT]
        if not isinstance(student, StudentEngine):
            raise TypeError(f"a {type(student).__name__} does not learn")
        return server_generator(of_model.prepared, student.student, rank=assembly.ranks.rank)
    return _local_generator(
        parts.models[rollouts.by], of_model, rows_at_once=rollouts.rows_per_call
    )


class Texts(StageExtra):
    """The evaluation of the student on generated texts."""

    def __init__(self, parts: StageParts, generation: GenerationConfig) -> None:
        of_model, config = parts.of_model, parts.assembly.config
        rows, student = of_model.prepared.encoded.validation, of_model.prepared.sources[STUDENT]
        self._texts = TextEvaluation(
            generation,
            prompts_of(rows, generation, config, student, key="eval.generation"),
            of_model.prepared.tokenizer,
            generator=_local_generator(
                parts.models[STUDENT], of_model, rows_at_once=generation.rows_per_call
            ),
            ranks=parts.assembly.ranks,
            folder=config.output_dir / TEXTS / parts.stage.name,
        )

    @override
    def scores(self, step: int) -> Mapping[str, float]:
        return self._texts.scores(step)


def _local_generator(
    engine: StudentEngine | Teacher, assembly: Assembly, *, rows_at_once: int
) -> LocalGenerator:
    if not isinstance(engine, StudentEngine | FrozenTeacher):
        raise TypeError(f"a {type(engine).__name__} generates no text")
    tokens = text_tokens(assembly.prepared.tokenizer, assembly.prepared.sources)
    return LocalGenerator(engine, tokens=tokens, rows_at_once=rows_at_once)
