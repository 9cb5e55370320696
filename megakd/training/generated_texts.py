"""Generated texts in a stage: their generators, its training batches, and its evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from megakd.config.rollout import GenerationConfig
from megakd.contract.completions import Completion, Generator, Sampling, TextTokens
from megakd.contract.stage import Teacher
from megakd.contract.tasks import STUDENT, TEXTS
from megakd.data.loader import RowOrder, StepLoader
from megakd.engine.collectives import on_main, together
from megakd.engine.sharding import whole_model
from megakd.engine.student import StudentEngine
from megakd.models.generation import complete, text_tokens
from megakd.teachers.frozen import FrozenTeacher
from megakd.teachers.prompts import prompts_of
from megakd.teachers.rollout_batches import RolloutSource
from megakd.teachers.rollout_store import RolloutStore
from megakd.teachers.text_evaluation import TextEvaluation
from megakd.training.checkpoint import steps_in
from megakd.training.served_texts import server_generator
from megakd.training.stage_batches import StageParts


class LocalGenerator:
    """A generator that uses the weights of an engine, `rows_at_once` prompts on a rank."""

    def __init__(
        self, engine: StudentEngine | Teacher, *, tokens: TextTokens, rows_at_once: int
    ) -> None:
        if not isinstance(engine, StudentEngine | FrozenTeacher):
            raise TypeError(f"a {type(engine).__name__} generates no text")
        self._engine = engine
        self._complete = partial(complete, tokens=tokens, rows_at_once=rows_at_once)

    def update(self, version: int) -> None:
        """Do nothing: the engine has the weights."""

    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> Callable[[], list[Completion]]:
        return partial(self._generate, prompts, seeds, sampling)

    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        if isinstance(self._engine, FrozenTeacher):
            self._engine.evict()  # a copy of shards to the device may still be running
            module = self._engine.model
        else:
            module = self._engine.student
        with whole_model(module) as model:
            # Ranks that finish early wait here, however long the others generate.
            return together(lambda: self._complete(model, prompts, seeds, sampling))


def rollout_batches(parts: StageParts) -> RolloutSource:
    """Return batches of which some steps learn from generated texts; a collective."""
    config, rollouts, student = parts.assembly.config, parts.stage.rollouts, parts.models[STUDENT]
    prepared, layout = parts.of_model.prepared, parts.layout
    generator: Generator
    if rollouts.server is None:
        generator = LocalGenerator(
            parts.models[rollouts.by],
            tokens=text_tokens(prepared.tokenizer, prepared.sources),
            rows_at_once=rollouts.rows_per_call,
        )
    elif isinstance(student, StudentEngine):
        rank = parts.assembly.ranks.rank
        generator = server_generator(prepared, student.student, rank=rank)
    else:
        raise TypeError(f"a {type(student).__name__} does not learn")
    train = prepared.encoded.train
    prompts = prompts_of(train, rollouts, config, prepared.sources[STUDENT])
    collate = parts.of_model.scorer(parts.stage.train).collate
    data = None
    if "data" in rollouts.draws:
        data = StepLoader(train, collate, layout=layout, seed=config.seed)
    store = RolloutStore(config.output_dir / "rollouts" / parts.stage.name)
    if not oldest(parts.checkpoints):  # those of a start that no checkpoint is left of
        on_main(store.clear)
    return RolloutSource(
        config=rollouts,
        prompts=prompts,
        continued=RowOrder(prompts.continued, layout.shape, seed=config.seed),
        data=data,
        collate=collate,
        layout=layout,
        generator=generator,
        store=store,
        seed=config.seed,
        oldest=lambda: oldest(parts.checkpoints),
    )


def oldest(folder: Path) -> int:
    """Return the step of the oldest checkpoint of a stage; 0 without one."""
    return min(steps_in(folder), default=0)


def text_evaluation(parts: StageParts, generation: GenerationConfig) -> TextEvaluation:
    """Return the evaluation of the student on generated texts."""
    prepared, config = parts.of_model.prepared, parts.assembly.config
    rows, student = prepared.encoded.validation, prepared.sources[STUDENT]
    return TextEvaluation(
        generation,
        prompts_of(rows, generation, config, student, key="eval.generation"),
        prepared.tokenizer,
        generator=LocalGenerator(
            parts.models[STUDENT],
            tokens=text_tokens(prepared.tokenizer, prepared.sources),
            rows_at_once=generation.rows_per_call,
        ),
        ranks=parts.assembly.ranks,
        folder=config.output_dir / TEXTS / parts.stage.name,
    )
