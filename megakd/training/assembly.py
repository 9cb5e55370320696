"""Engines of a stage, built from the prepared inputs, and its training batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from megakd.config.deepspeed import frozen_on, load_ds_config
from megakd.config.run import RunConfig
from megakd.config.sections import StudentConfig, TeacherConfig, TrainConfig
from megakd.config.task import STUDENT, Dtype, FusedLayers
from megakd.data.batch import BatchSource, Teacher
from megakd.data.collation import Collator, task_masking
from megakd.data.encoding import Encoded, labelled_only, tokens_key
from megakd.data.loader import OtherReading, StepLayout, StepLoader, StepShape
from megakd.data.tokenizers import characters_of_tokens
from megakd.engine.collectives import doing, gather, on_main
from megakd.engine.distributed import Ranks
from megakd.engine.initialize import training_engine
from megakd.engine.memory import forget_models, freed_memory_returned
from megakd.errors import CheckpointError, ConfigError
from megakd.losses.bundle import StudentBundle, build_bundle
from megakd.losses.objective import StageLosses, stage_losses, with_class_weights
from megakd.models.fitting import ModelSource, ReadyTeacher, label_order
from megakd.models.fused_layers import fuse_layers
from megakd.models.knowledge import Needs, SecondSize, add_second_vocabulary
from megakd.models.loading import check_finite, load_model
from megakd.models.lora import add_adapters
from megakd.models.packing import set_attention
from megakd.models.thresholds import stored_threshold, threshold_in
from megakd.process.files import RESULT, write_finished
from megakd.process.seeding import cpu_seeded
from megakd.process.terminal import phase
from megakd.stage import Stage, StageResult
from megakd.teachers.frozen import FrozenModel, FrozenTeacher
from megakd.training.checkpoint import Checkpoints, read_states
from megakd.training.evaluation import Scorer, StageProbe
from megakd.training.inputs import RunInputs
from megakd.training.precision import (
    TORCH_DTYPE,
    check_dtype,
    check_kernels,
    choice_of,
    frozen_dtype,
    scoring_dtype,
    training_dtype,
)
from megakd.training.recipes import learner_ds, scoring_preset
from megakd.training.stage_folder import read_result, result_text
from megakd.training.student import StudentEngine


def learning_models(
    stage: Stage,
    sources: Mapping[str, ModelSource],
    teachers: Mapping[str, ReadyTeacher],
    student: StudentConfig,
) -> dict[str, ModelSource]:
    """Return the models that learn in a stage, by role; ready `teachers` replace `sources`.

    The first is the stage's own model.
    """
    known = {**sources, **{name: teacher.source for name, teacher in teachers.items()}}
    learners = {role: known[role] for role in stage.beside}
    learners = {stage.role: stage.start or known[stage.role], **learners}
    if STUDENT in learners:
        learners[STUDENT] = learners[STUDENT].with_dropout(student.dropout)
    return learners


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts that engines are built from.

    teachers: the teachers that are ready, by name; a method may add teachers.
    are_finished: False in a dry run, whose teachers may lack the head of their fine-tuning.
    """

    prepared: RunInputs
    ranks: Ranks
    teachers: Mapping[str, ReadyTeacher] = field(default_factory=dict)
    are_finished: bool = True

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    def for_role(self, role: str) -> Assembly:
        """Return the assembly with the tokenizer and the data of the model of a role."""
        prepared = self.prepared.for_role(role)
        return self if prepared is self.prepared else replace(self, prepared=prepared)

    def once(self, name: str, make: Callable[[Path], None]) -> StageResult:
        """Return the result of an untrained stage; make its folder if missing; a collective.

        `make` writes the folder.
        """
        folder = self.stage_folder(name)
        result = read_result(folder)
        if result is None:
            make(folder)
            result = read_result(folder)
        if result is None:
            raise CheckpointError(
                f"{folder} was removed while megakd wrote it; start the run again"
            )
        return result

    def measured_once(self, name: str, measure: Callable[[], Mapping[str, float]]) -> StageResult:
        """Return the result of a measurement, see `once`; `measure` returns the metrics."""

        def make(folder: Path) -> None:
            began = time.perf_counter()
            result = StageResult(name=name, folder=folder, metrics=measure())
            result = replace(result, seconds=time.perf_counter() - began)
            on_main(lambda: write_finished(folder, {RESULT: result_text(result, {})}))

        return self.once(name, make)

    def stage_folder(self, name: str) -> Path:
        return self.config.output_dir / "stages" / name

    def learners(self, stage: Stage) -> dict[str, ModelSource]:
        return learning_models(stage, self.prepared.sources, self.teachers, self.config.student)

    def losses(self, stage: Stage) -> StageLosses:
        terms = with_class_weights(stage.objective, self.prepared.splits)
        return stage_losses(
            replace(stage, objective=terms),
            self.config.task.type,
            learners=self.learners(stage),
            teachers=[self.teachers[name].source for name in stage.models],
            classes=self.prepared.classes,
        )

    @phase("models")
    @doing("loading a model")
    def student(self, stage: Stage) -> tuple[StudentEngine, StudentBundle]:
        """Return the engine of the models that learn in this stage, and the bundle in it."""
        losses = self.losses(stage)
        losses.check()  # before anything is loaded
        ranks, device = self.ranks.world_size, self.ranks.device.type
        ds = learner_ds(stage, self.config, ranks=ranks, device=device)
        dtype = training_dtype(stage.train, self.ranks.device.type)
        check_dtype(dtype, self.ranks, "train")
        check_kernels(stage.train.kernels, self.ranks, "train")
        learners = {
            role: self._load(source, ds, dtype, need_head=False, fused=choice_of(stage))
            for role, source in self.learners(stage).items()
        }
        pair = self.prepared.pair
        for role, share in self.config.method.mixed(stage).items():
            if share and pair is not None:
                size, kind = SecondSize(len(pair.student), pair.offset), TORCH_DTYPE[dtype]
                model, seed = learners[role], self.config.seed
                add_second_vocabulary(model, size, ds=ds, dtype=kind, seed=seed)
        lora = self.config.lora_of(stage.role)
        if lora is not None:
            learner, source = learners[stage.role], self.learners(stage)[stage.role]
            add_adapters(learner, source, self.config.task, lora, seed=self.config.seed)
        # Projections start equal on every rank and do not change the stage's random numbers.
        with cpu_seeded(self.config.seed):
            bundle = build_bundle(
                losses,
                learners,
                dtype=TORCH_DTYPE[dtype],
                world_size=self.ranks.world_size,
                kernels=stage.train.kernels,
            )
        engine = training_engine(
            bundle,
            ds=ds,
            train=stage.train,
            dtype=dtype,
            rates=bundle.rates(stage.learners),
        )
        return StudentEngine(engine), bundle

    @phase("models")
    @doing("loading a model")
    def frozen(self, ready: ReadyTeacher) -> FrozenTeacher:
        ds, rows = self.frozen_ds(ready), self.config.train.per_device_train_batch_size
        module = self.frozen_module(ready, ds)
        return FrozenTeacher(module, ds=ds, dtype=self.teacher_dtype(ready), rows=rows)

    @contextmanager
    def loaded(self, ready: ReadyTeacher) -> Iterator[FrozenTeacher]:
        """Load a frozen model that only answers, for the length of the body."""
        model = self.frozen(ready)
        try:
            yield model
        finally:
            model.destroy()

    def scored(self, source: ModelSource) -> AbstractContextManager[FrozenTeacher]:
        """Load a finished model as it is scored."""
        preset = scoring_preset(self.config.student.deepspeed)
        dtype = scoring_dtype(self.config.train, self.ranks.device.type)
        spec = TeacherConfig(model=source.name, deepspeed=preset, dtype=dtype)
        return self.loaded(ReadyTeacher(source, spec))

    def frozen_ds(self, ready: ReadyTeacher) -> Mapping[str, Any]:
        ds = load_ds_config(ready.spec.deepspeed, where="teacher.deepspeed")
        return frozen_on(self.ranks.world_size, ds)

    def frozen_module(self, ready: ReadyTeacher, ds: Mapping[str, Any]) -> FrozenModel:
        """Load a model for an engine without an optimizer; `ds` is the config of that engine."""
        source, dtype, train = ready.source, self.teacher_dtype(ready), self.config.train
        check_dtype(dtype, self.ranks, "teacher.dtype")
        check_kernels(train.kernels, self.ranks, "train")
        need_head, fused = self.are_finished, train.fused_layers
        model = self._load(source, ds, dtype, need_head=need_head, fused=fused)
        order = label_order(model.config, self.prepared.splits.label_names, where=source.where)
        return FrozenModel(model, needs=Needs(), label_order=order, kernels=train.kernels)

    def probe(self, stage: str) -> StageProbe:
        folder = self.config.output_dir / "checkpoints" / stage / "beginning"
        beginning = Checkpoints(folder=folder, keep=None, ranks=self.ranks)
        return StageProbe(self.scorer(), self.prepared.encoded.validation, beginning)

    @cached_property
    def texts_key(self) -> str:
        """A key of the training rows as a teacher reads them; computing it reads all rows."""
        return on_main(lambda: tokens_key(self.prepared.encoded.train))

    def scorer(self, train: TrainConfig | None = None) -> Scorer:
        """Return a scorer on held-out rows; `train`: the settings of the evaluated stage."""
        return Scorer(
            metrics=self.prepared.metrics,
            collate=Collator(self.prepared.tokenizer, self.config.task),
            batch_size=self.config.eval_rows(train),
            ranks=self.ranks,
            masking=task_masking(self.prepared.tokenizer, self.config.task),
            characters=self._characters,
        )

    def scorer_of(self, model: FrozenTeacher) -> Scorer:
        """Return a scorer with the threshold of a model whose rows have any number of labels.

        It is that of the model's config, or the best on the validation rows; a collective.
        """
        scorer, splits = self.scorer(), self.prepared.splits
        if not splits.multi_label or scorer.metrics.threshold is not None:
            return scorer
        threshold = stored_threshold(model.model.config, splits.label_names)
        if threshold is None and splits.test is not None:
            values = scorer.score(model.predict, self.prepared.encoded.validation)
            threshold = threshold_in(values)
        return replace(scorer, metrics=replace(scorer.metrics, threshold=threshold))

    @cached_property
    def _characters(self) -> torch.Tensor | None:
        if self.config.task.type != "mlm":
            return None
        return characters_of_tokens(self.prepared.tokenizer)

    def teacher_dtype(self, ready: ReadyTeacher) -> Dtype:
        return frozen_dtype(ready.spec, ready.source.stored_dtype, self.ranks.device.type)

    def _load(
        self,
        source: ModelSource,
        ds: Mapping[str, Any],
        dtype: Dtype,
        *,
        need_head: bool,
        fused: FusedLayers,
    ) -> PreTrainedModel:
        forget_models()
        with freed_memory_returned():
            model = load_model(
                source,
                task=self.config.task,
                label_names=self.prepared.splits.label_names,
                tokenizer_size=source.config.vocab_size,  # checked before the run
                ds=ds,
                dtype=TORCH_DTYPE[dtype],
                seed=self.config.seed,
                need_head=need_head,
                device=self.ranks.device,
            )
        check_finite(model, source)
        torch.nn.Module.to(model, self.ranks.device)  # transformers' own `to` is typed wrongly
        set_attention(model, source, self.config.task.type, self.ranks.device)
        fuse_layers(model, source, fused, self.ranks.device)
        return model


class StageParts(NamedTuple):
    """Parts that batches are made from; `models`: `student`, and the frozen teachers by name."""

    stage: Stage
    assembly: Assembly
    models: Mapping[str, StudentEngine | Teacher]

    @property
    def of_model(self) -> Assembly:
        """The assembly with the tokenizer and the data of the stage's model."""
        return self.assembly.for_role(self.stage.role)

    @property
    def layout(self) -> StepLayout:
        train, config = self.stage.train, self.assembly.config
        return StepLayout(
            step_shape(train, self.assembly.ranks),
            train.tokens_per_rank,
            self.stage.teachers if config.method.routes_rows else (),
            by_length=config.train.packing is False,
        )

    @property
    def checkpoints(self) -> Path:
        return self.assembly.config.output_dir / "checkpoints" / self.stage.name


def step_shape(train: TrainConfig, ranks: Ranks) -> StepShape:
    """Return the distribution of a step's rows, for this rank."""
    return StepShape(
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        ranks.rank,
        ranks.world_size,
    )


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
    from megakd.data.streams import StreamedShare, StreamLoader

    # The rules of the config do not see the settings that a method gives to a stage.
    steps = stage.train.max_steps
    if steps is None or layout.tokens_per_rank is not None:
        key = "max_steps is missing" if steps is None else "tokens_per_rank is set"
        raise ConfigError(
            f"{stage.name}: {key} in the settings of the stage, and task.streaming is true: a "
            "stream has no epochs, and its rows are not packed; set max_steps and no "
            "tokens_per_rank, or remove task.streaming"
        )
    share = StreamedShare(encoded.stream, layout.shape, seed)
    return StreamLoader(share, collate, steps_per_epoch=steps, gather=gather, masking=masking)


def check_stream(checkpoint: Path, ranks: Ranks) -> None:
    """Raise if a checkpoint is of a stream that another number of ranks has read."""
    places = read_states(checkpoint, ranks.device)["batches"].get("places")
    if places is not None and len(places) != ranks.world_size:
        raise CheckpointError(
            f"{checkpoint} is of a stream that {len(places)} ranks have read, and this run has "
            f"{ranks.world_size}: a stream goes on only on as many ranks; start {len(places)} "
            "ranks, or set another output_dir"
        )
