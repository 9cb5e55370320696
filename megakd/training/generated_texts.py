"""Generated texts in a stage: its training batches, and its evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.contract.tasks import STUDENT, TEXTS
from megakd.data.files import matching_files
from megakd.data.loader import RowOrder
from megakd.engine.collectives import on_main
from megakd.engine.student import StudentEngine
from megakd.rollouts.evaluation import TextEvaluation
from megakd.rollouts.generators import FileGenerator, LocalGenerator, text_tokens
from megakd.rollouts.prompts import prompts_of
from megakd.rollouts.source import RolloutSource, StepRows
from megakd.rollouts.store import RolloutStore
from megakd.servers.connect import server_generator
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.checkpoint import oldest_step
from megakd.training.stage_folder import LENGTHS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from megakd.contract.rollouts import Generator
    from megakd.contract.stage import Stage, Teacher
    from megakd.data.step_layout import StepLayout
    from megakd.storage.fingerprint import Fingerprint
    from megakd.training.engines import Assembly

ROLLOUTS = "rollouts"
"""Folder of the generated texts in the folder of a run."""


def with_rollouts(
    stage: Stage,
    assembly: Assembly,
    *,
    layout: StepLayout,
    generator: Generator,
    fingerprint: Fingerprint,
) -> RolloutSource:
    """Return batches in which generated texts replace rows; a collective.

    Args:
        stage: a stage with `rollouts`.
        assembly: the assembly of the run.
        layout: how the rows of a step become micro-batches.
        generator: the generator of the texts.
        fingerprint: fingerprint of the stage.

    Raises:
        MegakdError: texts cannot be written.
    """
    own, config, rollouts = assembly.of(stage.role), assembly.config, stage.rollouts
    train, student = own.prepared.encoded.train, own.prepared.sources[STUDENT]
    prompts = prompts_of(train, rollouts, config, student)
    continued, learned = (
        RowOrder(numbers, layout.shape, seed=config.seed)
        for numbers in (prompts.continued, prompts.learned)
    )
    rows = StepRows(prompts, continued, learned, own.scorer(stage.train).collate, layout)
    store = RolloutStore(config.output_dir / ROLLOUTS / stage.name)
    # A longer run continues with the texts of the shorter run.
    facts = {key: value for key, value in fingerprint.items() if key not in LENGTHS}
    on_main(lambda: store.begin(facts))
    checkpoints = config.output_dir / "checkpoints" / stage.name
    return RolloutSource(
        rows,
        rollouts,
        generator=generator,
        store=store,
        seed=config.seed,
        oldest=lambda: oldest_step(checkpoints),
    )


def generator_of(
    stage: Stage, assembly: Assembly, models: Mapping[str, StudentEngine | Teacher]
) -> Generator:
    """Return the generator of a stage's texts; a collective.

    Args:
        stage: a stage with `rollouts`.
        assembly: the assembly of the run.
        models: the engines of the stage: `student`, and the teachers by name.

    Raises:
        MegakdError: a file of `rollout.files` cannot be read, or a server of `rollout.server` is
            not there.
    """
    rollouts = stage.rollouts
    if rollouts.files is not None:
        return FileGenerator(matching_files(rollouts.files, "rollout.files"))
    if rollouts.server is not None:
        own, student = assembly.of(stage.role), models[STUDENT]
        if not isinstance(student, StudentEngine):
            raise TypeError(f"a {type(student).__name__} does not learn")
        config, rank = assembly.config, assembly.ranks.rank
        return server_generator(config, own.prepared, student.student, rank=rank)
    return local_generator(
        models[rollouts.by], assembly.of(stage.role), rows_at_once=rollouts.rows_per_call
    )


def text_evaluation(
    stage: Stage, assembly: Assembly, student: StudentEngine
) -> TextEvaluation | None:
    """Return the evaluation of a stage on generated texts; None if there is none.

    Raises:
        MegakdError: the held-out rows have no prompts, or a package is missing.
    """
    generation = assembly.config.eval.generation
    if generation is None or stage.role != STUDENT:
        return None
    own, key = assembly.of(stage.role), "eval.generation"
    rows, student_model = own.prepared.encoded.validation, own.prepared.sources[STUDENT]
    return TextEvaluation(
        generation,
        prompts_of(rows, generation, assembly.config, student_model, key=key),
        own.prepared.tokenizer,
        generator=local_generator(student, own, rows_at_once=generation.rows_per_call),
        scorer=own.scorer(stage.train),
        folder=assembly.config.output_dir / TEXTS / stage.name,
    )


def local_generator(
    engine: StudentEngine | Teacher, own: Assembly, *, rows_at_once: int
) -> LocalGenerator:
    """Return the generator that uses the weights of an engine.

    Args:
        engine: engine of the student or of a frozen teacher.
        own: the assembly with the tokenizer of the student.
        rows_at_once: number of prompts that a rank continues at the same time.

    Raises:
        MegakdError: no token ends a text.
    """
    if not isinstance(engine, StudentEngine | FrozenTeacher):
        raise TypeError(f"a {type(engine).__name__} generates no text")
    tokens = text_tokens(own.prepared.tokenizer, own.prepared.sources)
    return LocalGenerator(engine, tokens=tokens, rows_at_once=rows_at_once)
