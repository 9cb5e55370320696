"""Everything a run needs before weights are loaded: data, tokenizer, model configs.

Checks run from cheap to expensive: weight files, then data and tokenizer, then heads and labels.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megakd.config.run import RunConfig
from megakd.config.sections import StudentConfig, TeacherConfig
from megakd.config.task import MOST_TOKENS, ONE_LABEL_METRICS, STUDENT, TaskConfig
from megakd.config.terms import HardCrossEntropy, Shape, looks_inside
from megakd.data.arrow import cache_folder, longest_of
from megakd.data.batch import LogitWarp
from megakd.data.encoding import Encoded, encode_rows, encode_splits, mixed, tokens_key
from megakd.data.loader import lengths_of_rows, prompt_lengths
from megakd.data.rows import RowKind, check_row_teachers
from megakd.data.splits import Splits, load_splits, read_line, read_warnings
from megakd.data.tokenizers import (
    VocabularyPair,
    characters_of_tokens,
    has_tokenizer_files,
    load_tokenizer,
    rows_for,
)
from megakd.engine.collectives import gather, main_first, node_name, on_main, once_per_node
from megakd.errors import ConfigError, DataError, MegakdError, TeacherError
from megakd.losses.objective import check_terms, shape_of, with_class_weights
from megakd.models.architectures import class_for, context_length, pools_by_padding
from megakd.models.fitting import ModelSource, label_order, specified
from megakd.models.fused_layers import check_fused_layers
from megakd.models.layers import as_student
from megakd.models.loading import check_model, resolve_model, with_vocabulary
from megakd.models.lora import check_adapters
from megakd.models.packing import check_varlen, packing_at
from megakd.models.quantized import check_fp8
from megakd.stage import Metric
from megakd.training.metrics import TaskMetrics, task_metrics
from megakd.training.tokenizer_checks import (
    check_answers,
    check_chat_models,
    other_vocabularies,
    without_tokenizer,
)

T = TypeVar("T")

logger = logging.getLogger(__name__)

PARTS = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}

LEAST_PACKED = 1024
"""Short documents need no short rows: rows are packed, and short rows would cut many of them."""

MOST_ROWS, MOST_CHARACTERS = 10_000, 20_000_000
"""Rows and characters that are measured at most, so that the cost does not grow with the data."""


def splits_of(config: RunConfig) -> Splits:
    """Return the texts and labels of a run; a collective."""
    task, seed = config.task, config.seed
    return once(config, lambda: load_splits(task, seed=seed, cache_dir=cache_folder()))


def encoded_rows(
    config: RunConfig,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    *,
    with_train: bool = True,
) -> Encoded:
    """Return the data as token numbers; a collective."""
    task, cache = config.task, cache_folder()
    encoded = once(
        config,
        lambda: encode_splits(
            splits,
            tokenizer,
            task,
            cache_dir=cache,
            with_train=with_train,
            packed=config.train.packing is not False,
        ),
    )
    if task.mixture is None or not with_train:
        return encoded
    return mixed(encoded, task.mixture, seed=config.seed)


def once(config: RunConfig, action: Callable[[], T]) -> T:
    """Return what `action` writes or finds in the cache; only one rank per node runs it."""
    if config.task.streaming:
        return main_first(action)  # a stream reads its files on every rank
    return once_per_node(action, place=str(cache_folder()))


def with_data(
    config: RunConfig,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, ModelSource],
) -> RunConfig:
    """Return the config with what the data and the models decide; a collective.

    These are `task.multi_label`, `train.packing` and `task.max_length`.

    Raises:
        ConfigError: rows are to be packed, and a model does not keep the texts of a row apart.
        ModelError: see `check_varlen`.
    """
    if config.task.type == "classification":
        config = replace(config, task=replace(config.task, multi_label=splits.multi_label))
    # Nobody knows the rows of a stream, so that its held-out rows are measured.
    rows = splits.train if splits.stream is None else splits.validation
    packing = _with_packing(config, splits.kind, sources)
    return _with_row_length(packing, rows, splits.kind, tokenizer, sources)


def _with_packing(
    config: RunConfig, kind: RowKind, sources: Mapping[str, ModelSource]
) -> RunConfig:
    train = config.train
    if config.task.type != "causal_lm" or train.packing is False:
        return config

    def mixing_models() -> list[str]:
        names: list[str] = []
        for role, source in sources.items():  # a server gets every text by itself
            if role not in config.teacher_specs or config.teacher_specs[role].server is None:
                check_varlen(source.config, source)
                if packing_at(source.where, source.config, source.attn_implementation) == "apart":
                    names.append(f"{source.where} ({source.config.model_type})")
        return names

    mixing = " and ".join(on_main(mixing_models))
    if not mixing:
        return replace(config, train=replace(train, packing=True))
    trainings = config.trainings.items()
    packs = [f"{where}.tokens_per_rank" for where, t in trainings if t.tokens_per_rank is not None]
    packs += ["train.packing: true"] * (train.packing is True)
    if packs:
        raise ConfigError(
            f"{packs[0]} packs several texts into a row, and {mixing} would not compute them there "
            "as it computes them alone; remove the key, so that every row has one text"
        )
    if not kind.is_chat:
        logger.info(
            "train.packing: false (auto): every row has one text, because %s would not compute "
            "several texts in a row as it computes them alone",
            mixing,
        )
    return replace(config, train=replace(train, packing=False))


def _with_row_length(
    config: RunConfig,
    rows: Dataset,
    kind: RowKind,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, ModelSource],
) -> RunConfig:
    """Return the config with `task.max_length`, and log what it means for the rows.

    A length that is not given is that of 99 % of the rows, or of their prompts and the texts that
    the run generates, up to the context of all models.
    """
    task = config.task
    # mlm splits texts into windows; the lines of conversations tell their lengths.
    if task.type == "mlm" or (task.max_length is not None and kind.is_chat):
        return config
    tokens, prompts, read = once(config, lambda: _lengths(rows, kind, tokenizer, task))
    parts = {name: longest_of(tokens, part) for name, part in PARTS.items()}
    told = ", ".join(f"{name} {length:,}" for name, length in parts.items()) + " tokens"
    if read < len(rows):
        told += f" ({read:,} of {len(rows):,} rows)"
    if task.max_length is None:
        # Documents of a mixture are not measured.
        is_single = kind.is_chat or config.train.packing is False
        least = 2 if is_single and len(tokens) else LEAST_PACKED
        prompt = longest_of(prompts, 0.99)
        length, limit = _chosen_length(max(least, parts["p99"]), prompt, config, sources)
        logger.info("task.max_length: %d (not set; %s); the rows have %s", length, limit, told)
        return replace(config, task=replace(task, max_length=length))
    if task.type == "causal_lm" or parts["p99"] <= task.max_length:
        logger.info("the rows have %s", told)
    else:
        logger.warning(
            "%.1f %% of the rows are cut at task.max_length %d; the rows have %s; "
            "task.max_length=%d keeps 99 %% of them whole",
            *(100 * (tokens > task.max_length).mean(), task.max_length, told, parts["p99"]),
        )
    return config


def _chosen_length(
    row: int, prompt: int, config: RunConfig, sources: Mapping[str, ModelSource]
) -> tuple[int, str]:
    # The length for rows, and for prompts with generated texts, in tokens; and what limits it.
    sections = [part for part in (config.rollout, config.eval.generation) if part is not None]
    wanted = max(
        [row, *((part.prompt_tokens or prompt) + part.max_new_tokens for part in sections)]
    )
    limits = [(context_length(s.config), f"the context of {s.where}") for s in sources.values()]
    limits += [
        (t.tokens_per_rank, f"{where}.tokens_per_rank") for where, t in config.trainings.items()
    ]
    rounded = -(-wanted // 8) * 8
    return min([(rounded, "for 99 % of the rows"), *((n, name) for n, name in limits if n)])


def _lengths(
    rows: Dataset, kind: RowKind, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    # [n] tokens of whole rows, [n] of the prompts in them, and the number of rows that were read.
    sample = rows.select(np.random.default_rng(0).permutation(len(rows))[:MOST_ROWS])
    sizes = np.cumsum([len(text) for text in sample["text"]])
    sample = sample.select(range(min(1 + np.searchsorted(sizes, MOST_CHARACTERS), len(sample))))
    whole = replace(task, max_length=MOST_TOKENS, truncation="keep_start")
    made, _ = encode_rows(
        sample, kind, tokenizer, whole, name="a sample", cache_dir=cache_folder(), packed=False
    )
    tokens = lengths_of_rows(made)
    if not kind.is_chat:
        return tokens, np.zeros_like(tokens), len(sample)
    prompts = prompt_lengths(made)
    # Documents beside conversations are cut anywhere.
    return tokens[prompts > 0], prompts[prompts > 0], len(sample)


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

    @cached_property
    def texts_key(self) -> str:
        """A key of the training rows as a teacher reads them; computing it reads all rows."""
        return on_main(lambda: tokens_key(self.encoded.train))

    @cached_property
    def characters(self) -> torch.Tensor | None:
        """[V] the number of characters of every token of a masked model's tokenizer."""
        return characters_of_tokens(self.tokenizer) if self.config.task.type == "mlm" else None

    def for_role(self, role: str) -> RunInputs:
        """Return the inputs with the tokenizer of a role, and with the data for this tokenizer."""
        tokenizer = self.tokenizer_of(role)
        if tokenizer is self.tokenizer or self.teacher_encoded is None:
            return self
        return dataclasses.replace(self, tokenizer=tokenizer, encoded=self.teacher_encoded)


def prepare(config: RunConfig, check: Callable[[UnencodedInputs], None] | None = None) -> RunInputs:
    """Find, check and encode the inputs of a run; a collective.

    All problems that configs, labels and vocabularies show are raised before the data is encoded,
    and before any model's weights are loaded; `check` is called then too.
    """
    unencoded = unencoded_inputs(config)
    if check is not None:
        check(unencoded)
    splits, teacher, metrics = unencoded.splits, unencoded.teacher_tokenizer, unencoded.metrics
    logger.info("%s", read_line(splits))
    rows = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
    for message in on_main(lambda: [*read_warnings(splits, step_rows=rows)]):
        logger.warning("warning: %s", message)
    config = with_data(config, splits, unencoded.tokenizer, unencoded.sources)
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
    if config.task.type == "causal_lm":
        from megakd.teachers.rollouts import check_generated_texts

        check_generated_texts(config, inputs.encoded, inputs.sources[STUDENT])
        chat = inputs.encoded.chat or {}
        check_answers(config.task, chat, inputs.tokenizer, inputs.sources[STUDENT])
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
    if splits.kind.is_chat:
        check_chat_models(task, tokenizer, sources)
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
    text = sized.config.get_text_config()
    if pools_by_padding(sized.config, task.type) and getattr(text, "pad_token_id", None) != pad:
        sized = replace(sized, config=copy.deepcopy(sized.config))
        sized.config.get_text_config().pad_token_id = pad
    is_end = pad in (None, tokenizer.eos_token_id)
    if source.wants_vocabulary and task.type == "causal_lm" and is_end:
        # A padding token has no gradient, and a decoder learns where texts end.
        sized.config.pad_token_id = None
    return sized


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
