"""Everything a run needs before a model's weights are loaded: data, tokenizer, model configs.

Checks run from cheap to expensive: weight files, then data and tokenizer, then heads and labels.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from megakd.config.models import KeptLayers, StudentConfig, TeacherConfig
from megakd.config.run import RunConfig
from megakd.config.task import TaskConfig
from megakd.contract.batch import LogitWarp
from megakd.contract.results import Metric
from megakd.contract.tasks import FP8, ONE_LABEL_METRICS, STUDENT
from megakd.contract.terms import HardCrossEntropy, looks_inside
from megakd.contract.views import Shape
from megakd.data.encoding import Encoded
from megakd.data.reading_report import read_line, read_warnings
from megakd.data.rows import check_row_teachers
from megakd.data.splits import Splits
from megakd.data.tokenizers import VocabularyPair, has_tokenizer_files, load_tokenizer, rows_for
from megakd.engine.collectives import gather, main_first, node_name, on_main
from megakd.errors import ConfigError, DataError, MegakdError, TeacherError
from megakd.losses.objective import check_terms, shape_of, with_class_weights
from megakd.models.architectures import class_for
from megakd.models.fitting import label_order
from megakd.models.fp8 import check_fp8
from megakd.models.fused_layers import check_fused_layers
from megakd.models.layers import with_layers
from megakd.models.loading import check_model, resolve_model, with_vocabulary
from megakd.models.lora import check_adapters
from megakd.models.source import ModelSource
from megakd.training.metrics import TaskMetrics, task_metrics
from megakd.training.run_data import (
    cache_folder,
    encoded_rows,
    once,
    splits_of,
    with_multi_label,
    with_packing,
    with_row_length,
)
from megakd.training.tokenizer_checks import (
    check_answers,
    check_chat_models,
    other_vocabularies,
    without_tokenizer,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UnencodedInputs:
    """The parts of a run, before anything large is loaded.

    tokenizer: the tokenizer of the data and of all models; with `teacher_tokenizer`, the student's.
    sources: the teachers by name, then `student`.
    teacher_tokenizer: the tokenizer of the teachers, if the student has a vocabulary of its own.
    """

    splits: Splits
    metrics: TaskMetrics
    tokenizer: PreTrainedTokenizerBase
    sources: Mapping[str, ModelSource]
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    def tokenizer_of(self, role: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the model of a role: `student`, or a teacher's name."""
        is_teacher = role != STUDENT and role in self.sources
        return (is_teacher and self.teacher_tokenizer) or self.tokenizer

    @property
    def pair(self) -> VocabularyPair | None:
        """The vocabularies of student and teacher; None if all models share a vocabulary."""
        if self.teacher_tokenizer is None:
            return None
        return VocabularyPair(self.tokenizer, self.teacher_tokenizer)

    @property
    def metric(self) -> Metric:
        return self.metrics.main

    @property
    def classes(self) -> int:
        return len(self.splits.label_names)


@dataclass(frozen=True, kw_only=True)
class RunInputs(UnencodedInputs):
    """All inputs of a run, with the encoded data; no weights are in memory yet.

    config: the config of the run, with the measured length of the rows.
    encoded: the data for `tokenizer`.
    teacher_encoded: the data for `teacher_tokenizer`.
    method_rows: training rows that the method makes for itself; None: it reads `encoded` alone.
    """

    config: RunConfig
    encoded: Encoded
    teacher_encoded: Encoded | None = None
    method_rows: Dataset | None = None

    def of(self, role: str) -> RunInputs:
        """Return the inputs with the tokenizer of a role, and with the data for this tokenizer."""
        tokenizer = self.tokenizer_of(role)
        if tokenizer is self.tokenizer or self.teacher_encoded is None:
            return self
        return dataclasses.replace(self, tokenizer=tokenizer, encoded=self.teacher_encoded)


def prepare(config: RunConfig) -> RunInputs:
    """Find, check and encode the inputs of a run; a collective.

    All problems that configs, labels and vocabularies show are raised before the data is encoded,
    and before any model's weights are loaded.
    """
    unencoded = unencoded_inputs(config)
    splits, teacher, metrics = unencoded.splits, unencoded.teacher_tokenizer, unencoded.metrics
    logger.info("%s", read_line(splits))
    rows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    for message in on_main(lambda: [*read_warnings(splits, step_rows=rows)]):
        logger.warning("warning: %s", message)
    config = with_multi_label(config, splits)
    config = with_packing(config, splits, unencoded.sources)
    config = with_row_length(config, splits, unencoded.tokenizer, unencoded.sources)
    check_run(config, unencoded)
    about_one = [name for name in metrics.names if name in ONE_LABEL_METRICS]
    if about_one and metrics.label_names:
        logger.info(
            "%s: computed for the label %s, the second of task.labels",
            *(", ".join(about_one), metrics.label_names[1]),
        )
    trains = any(spec.finetune for spec in config.teacher_specs.values())
    pair, cache = unencoded.pair, cache_folder()
    rows_of_method = partial(config.method.rows, config, splits, pair, cache_dir=cache)
    inputs = RunInputs(
        **vars(unencoded),
        config=config,
        method_rows=pair and once(config, rows_of_method),
        encoded=encoded_rows(config, splits, unencoded.tokenizer),
        teacher_encoded=(
            None if teacher is None else encoded_rows(config, splits, teacher, with_train=trains)
        ),
    )
    from megakd.teachers.prompts import check_generated_texts

    check_generated_texts(config, inputs.encoded, inputs.sources[STUDENT])
    check_answers(config.task, inputs.encoded.chat, inputs.tokenizer, inputs.sources[STUDENT])
    return inputs


def unencoded_inputs(config: RunConfig) -> UnencodedInputs:
    """Return the models, data and tokenizer of a run; a collective."""
    task, cache = config.task, cache_folder()
    sources, problems = _resolved(config)
    problems += without_tokenizer(task, sources.values())
    if problems and not config.teachers:
        raise TeacherError("\n".join(problems))
    splits = splits_of(config)
    _check_same_data(splits)
    if config.method.routes_rows:
        check_row_teachers(splits.train, tuple(config.teacher_specs))
    vocabulary = config.method.own_vocabulary
    # The loss per token does not compare models of different vocabularies.
    official = splits.metrics if vocabulary is None else ("nats_per_character",)
    metrics = task_metrics(
        config.eval, task.type, official, splits.label_names, multi_label=splits.multi_label
    )
    problems += _other_labels(config, sources, splits.label_names)
    # A student with a vocabulary of its own does not read the tokenizer of the other models.
    sharing = {r: s for r, s in sources.items() if vocabulary is None or r != STUDENT}
    folders = [s.folder for s in sharing.values() if s.folder]
    if problems and not any(map(has_tokenizer_files, folders)):
        raise TeacherError("\n".join(problems))  # do not train a tokenizer in vain
    tokenizer = main_first(
        lambda: load_tokenizer(task, splits, model_folders=folders, cache_dir=cache)
    )
    problems += other_vocabularies(task, tokenizer, sharing.values())
    if problems:
        raise TeacherError("\n".join(problems))
    check_chat_models(task, splits.train, tokenizer, sources)
    student, teacher = tokenizer, None
    if vocabulary is not None:
        teacher = tokenizer
        student = main_first(
            lambda: config.method.student_tokenizer(splits, tokenizer, cache_dir=cache)
        )
        logger.info(
            "student's vocabulary: a WordPiece of %d pieces trained on the training text; %.1f %% "
            "of the pieces are in the teacher's vocabulary of %d too",
            len(student),
            *(100 * VocabularyPair(student, teacher).overlap, len(teacher)),
        )
    return UnencodedInputs(
        splits=splits,
        metrics=metrics,
        tokenizer=student,
        sources={
            role: _with_tokens(source, student if role == STUDENT else tokenizer, task)
            for role, source in sources.items()
        },
        teacher_tokenizer=teacher,
    )


def _check_same_data(splits: Splits) -> None:
    (first, content), *others = gather((node_name(), splits.content_hash))
    for number, (node, here) in enumerate(others, start=1):
        if here != content:
            raise DataError(
                f"rank {number} on {node} reads other data than rank 0 on {first}: the files have "
                "other contents or are not all there; copy the same files to every node"
            )


def _other_labels(
    config: RunConfig, sources: Mapping[str, ModelSource], labels: Sequence[str]
) -> Iterator[str]:
    for name, spec in config.teacher_specs.items():
        if spec.finetune is None and name in sources and sources[name].folder is not None:
            try:
                label_order(sources[name].config, labels, where=sources[name].where)
            except MegakdError as error:
                yield str(error)


def _with_tokens(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> ModelSource:
    pad = cast("int | None", tokenizer.pad_token_id)  # transformers' own type allows several
    sized = with_vocabulary(source, rows_for(tokenizer), pad_token_id=pad)
    is_end = pad in (None, tokenizer.eos_token_id)
    if source.wants_vocabulary and task.type == "causal_lm" and is_end:
        # A padding token has no gradient, and a decoder learns where texts end.
        sized.config.pad_token_id = None
    return sized


def vocabulary_report(config: RunConfig, inputs: UnencodedInputs) -> dict[str, Any]:
    """Return the report's entries on the student's vocabulary; empty if all models share one."""
    vocabulary, pair = config.method.own_vocabulary, inputs.pair
    if vocabulary is None or pair is None:
        return {}
    return {
        "vocabulary.type": "wordpiece",
        "vocabulary.size": len(pair.student),
        "vocabulary.teacher_size": len(pair.teacher),
        "vocabulary.overlap": pair.overlap,
    }


def check_run(config: RunConfig, inputs: UnencodedInputs) -> None:
    """Run all checks of models and losses that are possible before any weights are loaded."""
    sources, task, teachers = inputs.sources, config.task, config.teacher_specs
    for role, source in sources.items():
        finetune = teachers[role].finetune if role in teachers else None
        if role in teachers and finetune is None and source.folder is None:
            key = config.key_of(role)
            logger.warning(
                "%s.model has random weights and %s.finetune is not set: the student would learn "
                "from an untrained teacher",
                *(key, key),
            )
        check_model(
            source,
            task=task,
            label_names=inputs.splits.label_names,
            tokenizer_size=rows_for(inputs.tokenizer_of(role)),
            need_head=role in teachers and not finetune,
        )
        if source.fp8:
            check_fp8(source, task.type, is_trained=finetune is not None)
        if config.train.fused_layers == "on":
            check_fused_layers(source, task.type)
    for where, train in config.trainings.items():
        keys = {f"{config.key_of(role)}.": source for role, source in sources.items()}
        source = next((s for key, s in keys.items() if where.startswith(key)), sources[STUDENT])
        model_class = class_for(source.config, task.type)
        has_it = getattr(model_class, "supports_gradient_checkpointing", True)
        if train.gradient_checkpointing and not has_it:
            raise ConfigError(
                f"{where}.gradient_checkpointing: transformers does not have it for a "
                f"{source.config.model_type} model; remove the key, and lower "
                f"{where}.per_device_train_batch_size if memory is short"
            )
    if config.student.lora is not None:
        check_adapters(sources[STUDENT], task, config.student.lora)
    _check_losses(config, inputs)
    check_caches(config, sources[STUDENT])


def _check_losses(config: RunConfig, inputs: UnencodedInputs) -> None:
    terms, sources = config.objective or (), inputs.sources
    shapes = {r: shape_of(s, config.task.type, inputs.classes) for r, s in sources.items()}
    teachers = {name: shapes[name] for name in config.teacher_specs}
    compared = [term.loss for term in terms if looks_inside(term)]
    if compared and len(set(teachers.values())) > 1:
        sizes = ", ".join(f"{name} {s.layers} x {s.width}" for name, s in teachers.items())
        raise ConfigError(
            f"objective: {', '.join(compared)} compares layers, and the teachers differ in number "
            f"of layers, width or heads (layers x width: {sizes}); use soft targets, which "
            "support such teachers"
        )
    for role in (STUDENT, *teachers) if compared else ():
        sources[role].architecture.check_layers()
        if not {*compared}.isdisjoint(("attention_mse", "relation_kl")):
            sources[role].architecture.check_attentions()
    if inputs.splits.multi_label:
        _refuse_weights(config)
    with_class_weights(terms, inputs.splits)
    soft = None if config.task.soft_labels is None else Shape(0, 0, inputs.classes)
    for teacher in teachers.values() or (soft,):
        check_terms(terms, shapes[STUDENT], teacher)


def _refuse_weights(config: RunConfig) -> None:
    weights: dict[str, object] = {
        f"{where}.class_weights": one.class_weights for where, one in config.trainings.items()
    }
    for index, term in enumerate(config.objective or ()):
        if isinstance(term, HardCrossEntropy):
            weights[f"objective[{index}].class_weights"] = term.class_weights
            weights[f"objective[{index}].label_smoothing"] = term.label_smoothing or None
    for key in (key for key, value in weights.items() if value is not None):
        raise ConfigError(
            f"{key}: weighs or smooths the one label of a row, and a row of these data has any "
            "number; remove the key"
        )


def check_caches(config: RunConfig, student: ModelSource) -> None:
    """Raise if the loss on the cached probabilities does not have the logits of the student."""
    cached = [
        f"{config.key_of(name)}.{'cache' if spec.cache else 'server'}"
        for name, spec in config.teacher_specs.items()
        if spec.cache or spec.server
    ]
    warp = student.architecture.warp
    if cached and config.task.type == "causal_lm" and warp != LogitWarp():
        raise ConfigError(
            f"{cached[0]}: the {student.config.model_type} student changes its logits after "
            f"the output matrix ({warp}), which the loss on cached probabilities does not "
            "support; remove the key, or use a student of another family"
        )


def _resolved(config: RunConfig) -> tuple[dict[str, ModelSource], list[str]]:
    # Rank 0 downloads before the other ranks read; an error of one rank is raised on all.
    sources, problems = dict[str, ModelSource](), list[str]()
    for role, spec in config.loaded_models.items():
        try:
            sources[role] = main_first(partial(resolve, spec, config, role))
        except MegakdError as error:
            if role not in config.teacher_specs or not config.teachers:
                raise
            problems.append(str(error))
    return sources if problems else with_student(config, sources), problems


def with_student(config: RunConfig, sources: dict[str, ModelSource]) -> dict[str, ModelSource]:
    """Return the sources with the student, and with teachers that are it without its adapters."""
    student = as_student(sources[config.start_role], config)
    bases = {
        name: dataclasses.replace(student, where=f"{config.key_of(name)}.model")
        for name in config.base_teachers
    }
    return {**sources, **bases, STUDENT: student}


def as_student(
    source: ModelSource, config: RunConfig, scores: Sequence[float] | None = None
) -> ModelSource:
    """Return the model that the student starts as, with the layers that the student keeps."""
    student = specified(dataclasses.replace(source, where="student.model"), config.student)
    layers = config.student.layers
    wanted = layers.keep if isinstance(layers, KeptLayers) else layers
    if wanted is None:
        return student
    return with_layers(student, wanted, where="student.layers", scores=scores)


def resolve(
    spec: TeacherConfig | StudentConfig, config: RunConfig, role: str, *, with_weights: bool = True
) -> ModelSource:
    """Return the model of a role; a plan reads no weights."""
    source = resolve_model(
        spec.model,
        config.task,
        where=f"{config.key_of(role)}.model",
        architecture=spec.architecture,
        trust_remote_code=spec.trust_remote_code,
        with_weights=with_weights,
    )
    return specified(source, spec)


def specified(source: ModelSource, spec: TeacherConfig | StudentConfig) -> ModelSource:
    """Return a model with the attention and, of a teacher, the 8 bits that its section asks for."""
    has_fp8 = isinstance(spec, TeacherConfig) and spec.dtype == FP8
    return dataclasses.replace(source, attn_implementation=spec.attn_implementation, fp8=has_fp8)
