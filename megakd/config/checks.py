"""Checks across the keys of a run config that need neither data nor models.

Refused is what would do something else without a word, or fail only after long work. The types and
ranges of a key stand at the key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

from megakd.config.deepspeed import check_frozen_stage, check_trained_sharding, load_ds_config
from megakd.config.error_text import shown
from megakd.config.models import ScratchModel, TeacherConfig
from megakd.config.rollout import RolloutConfig, RolloutServerConfig
from megakd.config.run import RunConfig
from megakd.config.task import TokenizerConfig
from megakd.contract.options import no_such_teacher
from megakd.contract.plugins import is_metric, metric_of
from megakd.contract.tasks import (
    AUTO,
    FROM_TEACHER,
    LANGUAGE_TASKS,
    METRICS,
    STUDENT,
    STUDENT_BASE,
    TEACHER,
    TFIDF,
)
from megakd.contract.terms import (
    SOFT_TARGET_DIVERGENCES,
    HardCrossEntropy,
    HardMse,
    HiddenCosine,
    HiddenMse,
    PluginTerm,
    RelationFsp,
    SoftTargetKl,
    SoftTargetMse,
    TermConfig,
    compares,
    looks_inside,
    source_of,
)
from megakd.errors import ConfigError, suggestion
from megakd.methods import baselines_of, methods_with
from megakd.process.terminal import in_home


def config_problems(config: RunConfig) -> list[str]:
    """Return the problems of a config that no data or model can solve, one line per problem."""
    sections = (
        *(_tables, _teachers, _student, _deepspeed, _objective, _task, _stream),
        *(_teachers_of_rows, _trainings, _metrics, _rollout),
    )
    return [problem for section in sections for problem in section(config)]


_COLUMNS = "messages_column prompt_column completion_column"
_CHATS = (
    f"{_COLUMNS} as_messages chat_template chat_template_kwargs reasoning train_on truncation "
    "end_tokens"
)
# Section, keys that differ from their defaults, and the tasks that read them.
_ONLY = (
    ("", "rollout", "causal_lm"),
    ("eval", "generation", "causal_lm"),
    ("eval", "positive_label", "classification"),
    ("objective", "class_weights label_smoothing count", "classification"),
    ("objective", "on", "causal_lm"),
    ("task", "labelled_examples", "classification regression"),
    ("task", "mlm_probability", "mlm"),
    ("task", "streaming", "mlm causal_lm"),
    ("task", f"{_CHATS} mixture", "causal_lm"),
    ("teachers", "cache_draws server", "causal_lm"),
    ("train", "packing", "causal_lm"),
    ("trainings", "tokens_per_rank", "causal_lm"),
)
# Section, keys, the key that excludes them (of the same section after a dot), and why.
_CONFLICTS = (
    ("", "rollout", "task.streaming", "because prompts are taken from rows on disk"),
    ("task", "train_files validation_files test_files mixture", ".dataset", "which has splits"),
    ("task", f"{_COLUMNS} as_messages", ".text_columns", "which names the columns of documents"),
    ("task", "prompt_column completion_column", ".messages_column", "which holds both"),
    ("task", "mixture", ".train_files", "which is one source"),
    ("task", "mixture", ".streaming", "because rows of a source are counted before training"),
    ("teachers", "cache", "rollout", "whose texts are not the rows that it answers"),
    ("teachers", "cache", "task.streaming", "whose rows have no numbers to find answers by"),
    ("teachers", "cache", "train.tokens_per_rank", "which packs several rows into one"),
    ("teachers", "server", ".cache", "which answers too"),
    ("teachers", "server", ".finetune", "which trains another model"),
    ("trainings", "tokens_per_rank", "task.streaming", "in which a rank has rows of its own"),
)
# Section, keys, and the key without which they have no effect.
_NEEDS = (
    ("eval", "keep_best", "eval.eval_steps"),
    ("eval.generation", "answer", ".match"),
    ("task", "dataset_config revision splits", ".dataset"),
    ("sources", "dataset_config revision split", ".dataset"),
    ("teachers", "cache_draws", ".cache"),
    ("trainings", "activation_offload", ".gradient_checkpointing"),
    ("trainings", "early_stopping_patience", "eval.eval_steps"),
)


def _tables(config: RunConfig) -> Iterator[str]:
    for section, keys, tasks in _ONLY:
        for key, _ in _changed(config, section, keys) if config.task.type not in tasks else ():
            yield (
                f"{key}: supported only for {tasks.replace(' ', ' and ')}, and task.type is "
                f"{config.task.type}; remove the key"
            )
    for section, keys, other, why in _CONFLICTS:
        for key, of_section in _changed(config, section, keys):
            name, value = _setting(config, key, of_section, other)
            if value:
                yield f"{key}: cannot be combined with {name}, {why}; remove one of the two"
    for section, keys, other in _NEEDS:
        for key, of_section in _changed(config, section, keys):
            name, value = _setting(config, key, of_section, other)
            got = getattr(of_section, key.rpartition(".")[2])
            if got and not value:
                yield (
                    f"{key}: {shown(got)} has no effect without {name}; set {name}, or remove the "
                    "key"
                )


def _changed(config: RunConfig, section: str, names: str) -> Iterator[tuple[str, Any]]:
    # The settings that differ from their defaults, by key, each with its section.
    for where, part in _sections(config, section).items():
        fields = getattr(part, "__pydantic_fields__", {})
        for name in (name for name in names.split() if name in fields):
            if getattr(part, name) != fields[name].get_default(call_default_factory=True):
                yield f"{where}.{name}".removeprefix("."), part


def _sections(config: RunConfig, name: str) -> Mapping[str, Any]:
    if name == "objective":  # a loss of another package may have options of the same names
        terms = enumerate(config.objective or ())
        return {f"{name}[{i}]": term for i, term in terms if not isinstance(term, PluginTerm)}
    if name == "sources":
        return {f"task.mixture.{k}": source for k, source in (config.task.mixture or {}).items()}
    if name == "teachers":
        return {config.key_of(role): spec for role, spec in config.teacher_specs.items()}
    if name == "trainings":  # without the keys that they inherit
        return {"train": config.train, **config.overrides}
    return {name: attrgetter(name)(config) if name else config}


def _setting(config: RunConfig, key: str, section: Any, other: str) -> tuple[str, Any]:
    where = key.rpartition(".")[0]
    if not other.startswith("."):
        return other, attrgetter(other)(config)
    inherited = config.trainings.get(where, section)
    return f"{where}{other}", getattr(inherited, other[1:])


def _unsupported(config: RunConfig, key: str, flag: str) -> Iterator[str]:
    if not getattr(config.method, flag):
        yield (
            f'{key}: method "{config.method.name}" does not support it; set method.name to '
            f"{' or '.join(methods_with(flag))}, or remove the key"
        )


def _teachers(config: RunConfig) -> Iterator[str]:
    method, specs = config.method, config.teacher_specs
    if method.needs_teacher and not specs:
        yield (
            f'teacher: missing, and method "{method.name}" needs a teacher; set teacher.model, or '
            'set method.name to "finetune"'
        )
    if config.teacher is not None and config.teachers:
        yield (
            "teachers: teacher is set too; move that teacher into the list and remove the section "
            "(teacher=null)"
        )
    names = [spec.name for spec in config.teachers]
    taken = [STUDENT, TEACHER, TFIDF, *config.trained_baselines, *names]
    for name, count in Counter(taken).items():
        if count > 1 and name in names:
            yield f'teachers: the name "{name}" is used {count} times in the run; choose another'
    yield from method.problems(config)
    for name, spec in specs.items():
        key = config.key_of(name)
        if spec.cache is not None:
            yield from _cache(config, f"{key}.cache", spec)
        if spec.server is not None:
            yield from _unsupported(config, f"{key}.server", "learns_from_rollouts")
            if spec.served_model is None:
                yield (
                    f"{key}.server: the model of the teacher is {spec.model!r}, which no server "
                    f"can serve; set {key}.model to the folder or the id of the served model"
                )
        if spec.model == STUDENT_BASE:
            yield from _base_teacher(config, key, spec)


def _base_teacher(config: RunConfig, key: str, spec: TeacherConfig) -> Iterator[str]:
    if config.student.lora is None or config.task.type not in LANGUAGE_TASKS:
        yield (
            f'{key}.model: "{STUDENT_BASE}" is the student without its adapters, and needs '
            "student.lora and task.type mlm or causal_lm (a classifier trains its head); set "
            f"{key}.model to a model"
        )
    for name in ("finetune", "cache", "dtype", "attn_implementation"):
        if getattr(spec, name) is not None:
            yield f'{key}.{name}: not supported with {key}.model "{STUDENT_BASE}"; remove the key'


def _cache(config: RunConfig, key: str, spec: TeacherConfig) -> Iterator[str]:
    if config.task.type == "mlm":
        yield (
            f"{key}: task.type mlm masks other tokens in every epoch, so cached outputs cannot be "
            "used again; remove the key"
        )
    if config.method.looks_into_teacher and spec.cache != AUTO:
        yield (
            f'{key}: method "{config.method.name}" needs more than the outputs of the teacher, and '
            'a cache holds only outputs; remove the key, or set it to "auto"'
        )
    if config.eval.losses and spec.cache != AUTO:
        yield (
            f"{key}: holds answers to training rows, and eval.losses compares held-out rows; set "
            'the key to "auto", or remove eval.losses'
        )


def _student(config: RunConfig) -> Iterator[str]:
    student, method = config.student, config.method
    model, is_cut = student.model, student.model == FROM_TEACHER
    if is_cut and student.layers is None and not method.cuts_student:
        yield (
            f'student.model: "{FROM_TEACHER}" needs a method that cuts the teacher, or the layers '
            f'to keep (got method "{method.name}"); set student.layers, set student.model to a '
            f"model, or set method.name to {' or '.join(methods_with('cuts_student'))}"
        )
    if method.cuts_student and (not is_cut or student.layers is not None):
        key = "layers" if is_cut else "model"
        remedy = "remove the key" if is_cut else f'set student.model to "{FROM_TEACHER}"'
        yield f'student.{key}: method "{method.name}" cuts the student out of its teacher; {remedy}'
    if isinstance(model, ScratchModel) and student.layers is not None:
        yield "student.layers: a model with random weights has no layers to keep; remove the key"
    if getattr(student.layers, "by", None) == "importance" and not is_cut:
        yield (
            "student.layers.by: importance is measured in the teacher that the student starts as; "
            f'set student.model to "{FROM_TEACHER}", or student.layers.by to spacing'
        )
    if student.teacher is not None and not is_cut:
        yield f'student.teacher: applies only to student.model "{FROM_TEACHER}"; remove the key'
    elif student.teacher not in (None, *config.teacher_specs):
        yield no_such_teacher(config, "student.teacher", str(student.teacher))
    elif is_cut and config.teachers and student.teacher is None:
        teachers = " or ".join(config.teacher_specs)
        yield f"student.teacher: missing, and there are several; set student.teacher to {teachers}"
    if student.lora is not None:
        yield from _adapters(config)


def _adapters(config: RunConfig) -> Iterator[str]:
    student = config.student
    if find_spec("peft") is None:
        yield (
            "student.lora: needs the package peft, which is not installed; install the extra lora "
            "of megakd (pip install 'megakd[lora]'), or remove the section"
        )
    yield from _unsupported(config, "student.lora", "learns_adapters")
    is_loaded = isinstance(student.model, str) and student.model != FROM_TEACHER
    if config.method.learns_adapters and not (is_loaded and student.layers is None):
        yield (
            "student.lora: adapters belong to a trained model that others can load, and this one "
            "is cut or has random weights; set student.model to such a model and remove "
            "student.layers, or remove the section"
        )


def _deepspeed(config: RunConfig) -> Iterator[str]:
    for where, ds in config.ds_configs.items():
        is_trained = where.endswith("finetune.deepspeed") or where == "student.deepspeed"
        check = check_trained_sharding if is_trained else check_frozen_stage
        try:
            check(load_ds_config(ds, where=where), where=where)
        except ConfigError as error:
            yield str(error)


def _objective(config: RunConfig) -> Iterator[str]:
    terms, task, method = config.objective or (), config.task.type, config.method
    for (name, source), count in Counter((term.loss, source_of(term)) for term in terms).items():
        if count > 1:
            on = f" with on: {source}" if source else ""
            yield f'objective: "{name}"{on} is listed {count} times; keep one, and set its weight'
    if terms and not any(term.weight for term in terms):
        yield "objective: every weight is 0; set at least one weight above 0"
    for index, term in enumerate(terms):
        key = f"objective[{index}]"
        if source_of(term) == "rollouts" and task == "causal_lm" and config.rollout is None:
            yield (
                f"{key}.on: rollouts, and this run generates no texts, so the term would be 0 at "
                "every step; add the section rollout, or remove the key"
            )
        if task not in (tasks := _tasks_of(term)):
            yield (
                f"{key}.loss: {term.loss} supports only task.type {', '.join(tasks)}, and "
                f"task.type is {task}; remove the term"
            )
            continue
        if compares(term) and not (method.needs_teacher or config.teacher_specs):
            yield (
                f"{key}.loss: {term.loss} compares with a teacher, and method "
                f'"{method.name}" has no teacher; remove the term or choose another method'
            )
        if config.train.tokens_per_rank and _counts_rows(term):
            yield (
                f"{key}.loss: {term.loss} is averaged over rows, and train.tokens_per_rank packs "
                "several rows into one; remove the key or the term"
            )
        for name in config.teacher_specs:
            wrong = _output_problems(config, name, term)
            yield from (f"{key}.loss: {term.loss} {problem}" for problem in wrong)


def _tasks_of(term: TermConfig) -> tuple[str, ...]:
    if isinstance(term, PluginTerm):
        return term.tasks
    if isinstance(term, HardMse | SoftTargetMse):
        return ("regression",)
    of_classes = isinstance(term, (HardCrossEntropy, *SOFT_TARGET_DIVERGENCES))
    return ("classification", *(() if of_classes else ("regression",)), *LANGUAGE_TASKS)


def _counts_rows(term: TermConfig) -> bool:
    if isinstance(term, HiddenMse | HiddenCosine):
        return term.positions == "first"
    return isinstance(term, RelationFsp) or getattr(term, "unit", None) == "examples"


def _output_problems(config: RunConfig, name: str, term: TermConfig) -> Iterator[str]:
    # The keys that replace a teacher by some of its outputs, with the part of the probabilities
    # that they hold (empty: all).
    spec, key, sources = config.teacher_specs[name], config.key_of(name), dict[str, str]()
    if spec.cache is not None:
        held = "the largest probabilities" if spec.cache_draws is None else "random draws"
        sources[f"{key}.cache"] = held if config.task.type == "causal_lm" else ""
    if spec.server is not None:
        sources[f"{key}.server"] = "the largest probabilities"
    for source, held in sources.items():
        if looks_inside(term):
            yield (
                f"needs more than the outputs of the teacher, and {source} holds only outputs; "
                f"remove {source} or the term"
            )
        elif held and isinstance(term, SoftTargetKl) and term.temperature != 1:
            yield (
                f"at temperature {term.temperature:g}: {source} holds only {held}, at temperature "
                f"1; set temperature to 1, or remove {source}"
            )
        elif held and compares(term) and not isinstance(term, SoftTargetKl):
            yield (
                f"needs all probabilities of the teacher, and {source} holds only {held}, which "
                f"suffice for soft_target_kl alone; remove {source} or the term"
            )


def _task(config: RunConfig) -> Iterator[str]:
    task = config.task
    if task.dataset is None and not (task.train_files or task.mixture):
        yield (
            "task.dataset: missing, and it has no default; set task.dataset or task.train_files, "
            "or name several sources in task.mixture"
        )
    if (task.dataset or "").startswith("glue/"):
        of_others = (
            f"text_columns label_column teacher_column dataset_config splits streaming {_COLUMNS}"
        )
        for key, _ in _changed(config, "task", of_others):
            yield (
                f"{key}: not supported with task.dataset {task.dataset}, which is read whole and "
                "has its own columns; remove the key"
            )
    if task.splits is not None and "train" not in task.splits:
        yield (
            "task.splits: names no split for train; name one, as in {train: train_sft, "
            "validation: test_sft}"
        )
    for name, source in (task.mixture or {}).items():
        if (source.files is None) == (source.dataset is None):
            yield (
                f"task.mixture.{name}.files: must be set, or dataset for a data set of the Hub, "
                "and not both"
            )
    if task.completion_column and not (task.prompt_column or task.messages_column):
        yield "task.prompt_column: missing, and task.completion_column is set; set the key too"
    if task.chat_template and not in_home(task.chat_template).is_file():
        yield (
            f"task.chat_template: the file {task.chat_template} does not exist; give a file with a "
            "chat template in Jinja, or remove the key to use the tokenizer's"
        )


def _stream(config: RunConfig) -> Iterator[str]:
    task = config.task
    if not task.streaming or task.type not in LANGUAGE_TASKS:
        return
    if isinstance(task.tokenizer, TokenizerConfig):
        yield (
            f"task.tokenizer: a {task.tokenizer.type} cannot be trained on a stream (task.streaming"
            " is true); set a folder or a Hub id"
        )
    if task.train_files and not (task.validation_files or task.max_eval_examples):
        yield (
            "task.streaming: a stream has no end, so no share of it can be held out; set "
            "task.validation_files, or set task.max_eval_examples to hold out this many texts from "
            "the beginning of task.train_files"
        )
    endless = [where for where, train in config.trainings.items() if train.max_steps is None]
    # The other sections inherit the key of `train`.
    for where in endless[:1] if "train" in endless else endless:
        yield (
            f"{where}.max_steps: missing, and task.streaming is true: a stream has no end, so "
            f"num_train_epochs says nothing; set {where}.max_steps, or remove task.streaming"
        )


def _teachers_of_rows(config: RunConfig) -> Iterator[str]:
    task, method = config.task, config.method
    sources = {f"task.mixture.{k}.teacher": s.teacher for k, s in (task.mixture or {}).items()}
    named = {key: name for key, name in sources.items() if name is not None}
    if not method.routes_rows:
        for key in (["task.teacher_column"] if task.teacher_column else []) + [*named]:
            yield from _unsupported(config, key, "routes_rows")
        return
    unnamed = [key for key in sources if key not in named] if named else ["task.teacher_column"]
    for key in unnamed if task.teacher_column is None else ():
        yield (
            f"{key}: missing, and every training row has to name its teacher; set the key "
            "(task.teacher_column, or task.mixture.<name>.teacher of every source)"
        )
    if task.teacher_column is not None and sources and len(named) == len(sources):
        yield (
            "task.teacher_column: is not read, because every source of task.mixture names its "
            "teacher; remove one of the two"
        )
    if task.streaming:
        yield (
            f"task.streaming: not supported by method {method.name}, which counts the rows of each "
            "teacher before training; remove the key"
        )
    if config.eval.losses:
        yield (
            "eval.losses: compares held-out rows with the teachers, and only training rows name a "
            f"teacher (method {method.name}); remove the key"
        )
    for key, name in named.items():
        if name not in config.teacher_specs:
            yield no_such_teacher(config, key, name)


def _trainings(config: RunConfig) -> Iterator[str]:
    task, known = config.task, baselines_of(config.method)
    known = (*known, TFIDF) if task.type == "classification" else known
    if config.alone is not None and "alone" not in config.trained_baselines:
        yield "alone: baselines does not list alone; add baselines: [alone], or remove the section"
    for name, count in Counter(config.baselines or ()).items():
        if name not in known:
            yield (
                f'baselines: method "{config.method.name}" has no baseline '
                f'"{name}"{suggestion(name, known)} (known: {", ".join(known)})'
            )
        if count > 1:
            yield f'baselines: "{name}" is listed {count} times; list every baseline once'
    both = [where for where, train in config.trainings.items() if train.bf16 and train.fp16]
    for where in both[:1] if "train" in both else both:
        yield f"{where}: bf16 and fp16 are both true, here or in train; set one to false here"
    whole = "holds for the whole run; remove the key, and set"
    for where, overrides in config.overrides.items():
        for name in ("collective_timeout", "packing"):
            if getattr(overrides, name) is not None:
                yield f"{where}.{name}: {whole} train.{name}"
    for where, train in _sections(config, "trainings").items():
        tokens, length = train.tokens_per_rank, task.max_length or 0
        if tokens is not None and task.type == "causal_lm" and tokens < length:
            yield (
                f"{where}.tokens_per_rank: {tokens} is less than task.max_length {length}, and a "
                f"row is never split; set {where}.tokens_per_rank to at least {length}"
            )
        if tokens is not None and config.train.packing is False:
            yield (
                f"{where}.tokens_per_rank: packs several rows into one, and train.packing is "
                "false; remove one of the two"
            )


def _metrics(config: RunConfig) -> Iterator[str]:
    task, known = config.task.type, METRICS[config.task.type]
    listed = {f"metrics[{index}]": name for index, name in enumerate(config.eval.metrics)}
    for key, name in {"metric": config.eval.metric, **listed}.items():
        if name is None or name in known:
            continue
        if not is_metric(name):
            near = suggestion(name, known) or ";"
            yield (
                f'eval.{key}: task.type {task} has no metric "{name}"{near} known: '
                f"{', '.join(known)}"
            )
        elif task in LANGUAGE_TASKS:
            yield (
                f"eval.{key}: {name} needs the outputs of all rows at once, which task.type {task} "
                "does not form; remove the metric"
            )
        else:
            try:
                metric_of(name)
            except ConfigError as error:
                yield f"eval.{key}: {error}"


def _rollout(config: RunConfig) -> Iterator[str]:
    rollout, teachers = config.rollout, config.teacher_specs
    if rollout is None:
        return
    yield from _unsupported(config, "rollout", "learns_from_rollouts")
    if rollout.by != STUDENT and rollout.by not in teachers:
        yield no_such_teacher(config, "rollout.by", rollout.by)
    elif rollout.by != STUDENT and rollout.server is None:
        if rollout.by in config.base_teachers:
            yield (
                f"rollout.by: {rollout.by} is the student without its adapters, which generates no "
                "texts; set the key to student"
            )
        if teachers[rollout.by].server is not None:
            yield (
                f"rollout.by: {rollout.by} is not loaded ({config.key_of(rollout.by)}.server), so "
                "it generates no texts; name its servers in rollout.server with push: none"
            )
    yield from _sources(config, rollout)
    if rollout.server is not None:
        yield from _rollout_server(config, rollout, rollout.server)


def _sources(config: RunConfig, rollout: RolloutConfig) -> Iterator[str]:
    # Without `on`, a term learns from all texts; without `objective`, the terms have no `on`.
    taught = {source_of(term) for term in config.objective} if config.objective else {None}
    drawn = rollout.draws
    untaught = () if None in taught else sorted(drawn - taught)
    for source in untaught:
        yield (
            f"objective: no term learns from {source}, which rollout.mix or rollout.from_step "
            f"draws; add a term without on or with on: {source}, or change the section rollout"
        )
    writes_itself = rollout.by == STUDENT and "rollouts" in drawn
    for index, term in enumerate(config.objective or ()):
        source = source_of(term)
        if source not in {None, *drawn} and not untaught:
            yield (
                f"objective[{index}].on: {source}, and with rollout.mix {rollout.mix:g} no step "
                "learns from them, so that the term would be 0; change rollout.mix, or remove the "
                "term"
            )
        is_hard = isinstance(term, HardCrossEntropy) and term.weight > 0
        if is_hard and writes_itself and source != "data":
            yield (
                f"objective[{index}].on: {source or 'null'}, so that {term.loss} would take texts "
                "that the student writes (rollout.by: student) as labels; set the key to data "
                "with rollout.mix below 1, or remove the term"
            )


def _rollout_server(
    config: RunConfig, rollout: RolloutConfig, server: RolloutServerConfig
) -> Iterator[str]:
    key, push = "rollout.server", server.push
    if config.served_model is None:
        yield (
            f"{key}.model: missing, and the config names no model that the servers could serve; "
            f"set {key}.model to the name of the served model"
        )
    if push == "adapter" and config.student.lora is None:
        yield (
            f"{key}.push: adapter pushes the adapters of the student, and student.lora is not set; "
            "add student.lora, or set push to full"
        )
    if push != "none" and rollout.by != STUDENT:
        yield (
            f"{key}.push: {push} pushes the weights of the student, and rollout.by is {rollout.by},"
            " whose weights do not change; set push to none"
        )
    if (server.folder is None) == (push != "none"):
        problem = "missing with" if server.folder is None else "is not used with"
        yield (
            f"{key}.folder: {problem} push: {push}; weights are pushed through a folder that rank "
            "0 and all servers see"
        )
