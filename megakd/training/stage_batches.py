"""The training batches of a stage, and the features that change them, such as generated texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from typing_extensions import override

from megakd.config.rollout import GenerationConfig
from megakd.config.train import TrainConfig
from megakd.contract.batch import BatchSource
from megakd.contract.completions import Generator
from megakd.contract.stage import MeanLosses, Stage, Teacher
from megakd.contract.tasks import STUDENT, TEXTS
from megakd.data.encoding import Encoded, labelled_only
from megakd.data.files import matching_files
from megakd.data.loader import OtherReading, RowOrder, StepLoader
from megakd.data.step_layout import StepLayout, StepShape, check_shares
from megakd.engine.collectives import gather, on_main
from megakd.engine.distributed import Ranks
from megakd.engine.student import StudentEngine
from megakd.errors import ConfigError
from megakd.rollouts.batches import RolloutSource, StepRows
from megakd.rollouts.generators import FileGenerator, LocalGenerator, text_tokens
from megakd.rollouts.prompts import prompts_of
from megakd.rollouts.store import RolloutStore
from megakd.rollouts.text_evaluation import TextEvaluation
from megakd.servers.connect import server_generator
from megakd.storage.fingerprint import Fingerprint
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.assembly import Assembly
from megakd.training.checkpoint import oldest_step, read_states
from megakd.training.stage_folder import LENGTHS


class StageParts(NamedTuple):
    """Parts that the extras of a stage are made from; `models`: `student`, and frozen teachers."""

    stage: Stage
    assembly: Assembly
    models: Mapping[str, StudentEngine | Teacher]
    fingerprint: Fingerprint

    @property
    def of_model(self) -> Assembly:
        """The assembly with the tokenizer and the data of the stage's model."""
        return self.assembly.of(self.stage.role)

    @property
    def layout(self) -> StepLayout:
        train = self.stage.train
        return StepLayout(step_shape(train, self.assembly.ranks), train.tokens_per_rank)

    @property
    def checkpoints(self) -> Path:
        return self.assembly.config.output_dir / "checkpoints" / self.stage.name


class StageExtra:
    """A feature of a stage; every hook may be a collective, and changes nothing here."""

    def source(self) -> BatchSource | None:
        """Return the batches of the stage if they are not simply those of the training rows."""
        return None

    def scores(self, step: int, losses: MeanLosses) -> Mapping[str, float]:
        """Return metrics of the student after `step` steps, the same on every rank."""
        del step, losses
        return {}

    def curves(self) -> Mapping[str, float]:
        """Return further values of the last `scores`, for the log."""
        return {}


def step_shape(train: TrainConfig, ranks: Ranks) -> StepShape:
    """Return the distribution of a step's rows, for this rank."""
    return StepShape(
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        ranks.rank,
        ranks.world_size,
    )


def extras_of(parts: StageParts) -> list[StageExtra]:
    """Return the features that a stage and the config of its run ask for; a collective."""
    stage, generation = parts.stage, parts.assembly.config.eval.generation
    extras: list[StageExtra] = []
    if stage.rollouts is not None:
        extras.append(Rollouts(parts))
    extras.extend(parts.assembly.config.method.extras(parts))
    if generation is not None and stage.role == STUDENT and not stage.views:
        extras.append(Texts(parts, generation))
    return extras


def row_batches(
    parts: StageParts, encoded: Encoded, others: Mapping[str, OtherReading] | None = None
) -> BatchSource:
    """Return a stage's batches of encoded rows, for this rank; `others` as in `data.loader`."""
    stage, layout, seed = parts.stage, parts.layout, parts.assembly.config.seed
    scorer = parts.of_model.scorer(stage.train)
    collate, masking, others = scorer.collate, scorer.masking, others or {}
    if encoded.stream is None:
        rows = labelled_only(encoded.train) if stage.labelled_only else encoded.train
        return StepLoader(rows, collate, layout=layout, seed=seed, masking=masking, others=others)
    from megakd.data.stream_loader import EncodedStream, StreamLoader

    # The rules of the config do not see the settings that a method gives to a stage.
    steps = stage.train.max_steps
    if steps is None or layout.tokens_per_rank is not None:
        key = "max_steps is missing" if steps is None else "tokens_per_rank is set"
        raise ConfigError(
            f"{stage.name}: {key} in the settings of the stage, and task.streaming is true: a "
            "stream has no epochs, and its rows are not packed; set max_steps and no "
            "tokens_per_rank, or remove task.streaming"
        )
    rows = EncodedStream(encoded.stream, shape=layout.shape, seed=seed)
    return StreamLoader(rows, collate, steps_per_epoch=steps, gather=gather, masking=masking)


def check_readers(checkpoint: Path, ranks: Ranks) -> None:
    """Raise if the readers of a stream in a checkpoint cannot be divided among the ranks."""
    readers = len(read_states(checkpoint, ranks.device)["batches"].get("readers", ()))
    check_shares(readers, ranks.world_size, where=str(checkpoint))


class Rollouts(StageExtra):
    """Batches in which generated texts replace rows."""

    def __init__(self, parts: StageParts) -> None:
        self._parts, self._generator = parts, generator_of(parts)

    @override
    def source(self) -> RolloutSource:
        parts, config = self._parts, self._parts.assembly.config
        rollouts = parts.stage.rollouts
        of_model, layout = parts.of_model, parts.layout
        train, student = of_model.prepared.encoded.train, of_model.prepared.sources[STUDENT]
        prompts = prompts_of(train, rollouts, config, student)
        continued, learned = (
            RowOrder(numbers, layout.shape, seed=config.seed)
            for numbers in (prompts.continued, prompts.learned)
        )
        collate = of_model.scorer(parts.stage.train).collate
        store = RolloutStore(config.output_dir / "rollouts" / parts.stage.name)
        # A longer run goes on from a checkpoint of the shorter one, with its texts.
        may_differ = LENGTHS if oldest_step(parts.checkpoints) else ()
        on_main(lambda: store.begin(parts.fingerprint, may_differ=may_differ))
        return RolloutSource(
            StepRows(prompts, continued, learned, collate, layout),
            rollouts,
            generator=self._generator,
            store=store,
            seed=config.seed,
            oldest=lambda: oldest_step(parts.checkpoints),
        )


def generator_of(parts: StageParts) -> Generator:
    """Return the generator of a stage's texts: files, a server, or the weights of a model."""
    rollouts, of_model, assembly = parts.stage.rollouts, parts.of_model, parts.assembly
    if rollouts.files is not None:
        return FileGenerator(matching_files(rollouts.files, "rollout.files"))
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
            scorer=of_model.scorer(parts.stage.train),
            folder=config.output_dir / TEXTS / parts.stage.name,
        )
        # Where a row is compared with the teacher that it names, held-out rows name none, and
        # answers that are kept are for training rows.
        stage, teachers = parts.stage, parts.assembly.teachers
        self._has_losses = not stage.strategy.routes_rows and all(
            one.spec.cache is None or one.is_loaded(measures_losses=stage.measures_losses)
            for one in (teachers[name] for name in stage.teachers)
        )

    @override
    def scores(self, step: int, losses: MeanLosses) -> Mapping[str, float]:
        return self._texts.scores(step, losses if self._has_losses else None)

    @override
    def curves(self) -> Mapping[str, float]:
        return self._texts.by_position


def _local_generator(
    engine: StudentEngine | Teacher, assembly: Assembly, *, rows_at_once: int
) -> LocalGenerator:
    if not isinstance(engine, StudentEngine | FrozenTeacher):
        raise TypeError(f"a {type(engine).__name__} generates no text")
    tokens = text_tokens(assembly.prepared.tokenizer, assembly.prepared.sources)
    return LocalGenerator(engine, tokens=tokens, rows_at_once=rows_at_once)
