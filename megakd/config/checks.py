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

from megakd.config.deepspeed import load_ds_config
from megakd.config.options import file_of, methods_with, no_such_teacher
from megakd.config.paths import expand_path
from megakd.config.run import RunConfig
from megakd.config.sections import RolloutServerConfig, ScratchModel, TeacherConfig
from megakd.config.task import (
    AUTO,
    FROM_TEACHER,
    LANGUAGE_TASKS,
    METRICS,
    STUDENT,
    STUDENT_BASE,
    TEACHER,
    UNTRAINED,
    TokenizerConfig,
)
from megakd.config.terms import (
    HardCrossEntropy,
    HiddenCosine,
    HiddenMse,
    PluginTerm,
    RelationFsp,
    SoftTargetKl,
    Term,
    looks_inside,
    source_of,
)
from megakd.errors import ConfigError, suggestion
from megakd.plugins import is_metric, metric_of


def config_problems(config: RunConfig) -> list[str]:
    """Return the problems of a config that no data or model can solve, one line per problem."""
    sections = (
        *(_tables, _teachers, _student, _deepspeed, _objective, _task, _labels),
        *(_stream, _trainings, _metrics, _rollout),
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
    ("objective", "class_weights label_smoothing count", "classification"),
    ("objective", "on", "causal_lm"),
    ("task", "label_separator labels multi_label soft_labels", "classification"),
    ("task", "labelled_examples", "classification regression"),
    ("task", "mlm_probability", "mlm"),
    ("task", "streaming", "mlm causal_lm"),
    ("task", f"{_CHATS} mixture", "causal_lm"),
    ("teachers", "cache", "classification regression causal_lm"),  # mlm masks anew in every epoch
    ("teachers", "cache_draws server", "causal_lm"),
    ("train", "packing", "causal_lm"),
    ("trainings", "class_weights", "classification"),
    ("trainings", "tokens_per_rank", "causal_lm"),
)
# Section, keys, and the class variable of the methods that support them.
_FEATURES = (
    ("teachers", "server", "learns_from_rollouts"),
    ("", "rollout", "learns_from_rollouts"),
    ("student", "lora", "learns_adapters"),
    ("task", "soft_labels", "reads_soft_labels"),
    ("task", "teacher_column", "routes_rows"),
    ("sources", "teacher", "routes_rows"),
)
# Section, keys, the key that excludes them (of the same section after a dot), and why.
_CONFLICTS = (
    ("", "rollout", "task.streaming", "because prompts are taken from rows on disk"),
    ("task", "train_files validation_files test_files mixture", ".dataset", "which has splits"),
    ("task", f"{_COLUMNS} as_messages", ".text_columns", "which names the columns of documents"),
    ("task", "prompt_column completion_column", ".messages_column", "which holds both"),
    ("task", "mixture", ".train_files", "which is one source"),
    ("task", "mixture", ".streaming", "because rows of a source are counted before training"),
    ("task", "soft_labels", "teacher", "which answers too"),
    ("task", "soft_labels", "teachers", "which answer too"),
    ("task", "soft_labels", "eval.losses", "because held-out rows have none"),
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
    task = config.task.type
    for section, keys, tasks in _ONLY:
        only = f"supported only for {tasks.replace(' ', ' and ')}, and task.type is {task}"
        for key, _ in _changed(config, section, keys) if task not in tasks else ():
            yield f"{key}: {only}; remove the key"
    for section, keys, flag in _FEATURES:
        for key, _ in () if getattr(config.method, flag) else _changed(config, section, keys):
            others = " or ".join(methods_with(flag))
            yield f"{key}: not supported by method {config.method.name}; remove it, or use {others}"
    for section, keys, other, why in _CONFLICTS:
        for key, of_section in _changed(config, section, keys):
            name, value = _setting(config, key, of_section, other)
            if value:
                yield f"{key}: cannot be combined with {name}, {why}; remove one of the two"
    for section, keys, other in _NEEDS:
        for key, of_section in _changed(config, section, keys):
            name, value = _setting(config, key, of_section, other)
            if getattr(of_section, key.rpartition(".")[2]) and not value:
                yield f"{key}: has no effect without {name}; set {name}, or remove the key"


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


def _teachers(config: RunConfig) -> Iterator[str]:
    method, specs = config.method, config.teacher_specs
    if method.needs_teacher and not specs and config.task.soft_labels is None:
        yield f"teacher: missing, and method {method.name} needs one; set teacher.model"
    if config.teacher is not None and config.teachers:
        yield "teachers: teacher is set too; move it into the list, and set teacher=null"
    names = [spec.name for spec in config.teachers]
    taken = [STUDENT, TEACHER, *UNTRAINED, *config.trained_baselines, *names]
    for name, count in Counter(taken).items():
        if count > 1 and name in names:
            yield f'teachers: the name "{name}" is used {count} times in the run; choose another'
    yield from method.problems(config)
    for name, spec in specs.items():
        yield from _teacher(config, config.key_of(name), spec)


def _teacher(config: RunConfig, key: str, spec: TeacherConfig) -> Iterator[str]:
    method, task = config.method, config.task.type
    if spec.cache not in (None, AUTO):
        if method.looks_into_teacher:
            yield f'{key}.cache: method {method.name} needs more than outputs; set it to "auto"'
        if config.eval.losses:
            yield f'{key}.cache: has no answers for eval.losses; set it to "auto"'
    if spec.server is not None and spec.served_model is None:
        yield f"{key}.server: no server can serve {spec.model!r}; set {key}.model to a served model"
    if spec.model == STUDENT_BASE:
        if config.student.lora is None or task not in LANGUAGE_TASKS:
            yield (
                f'{key}.model: "{STUDENT_BASE}" is the student without its adapters, and needs '
                "student.lora and task.type mlm or causal_lm; set a model"
            )
        for name in ("finetune", "cache", "dtype", "attn_implementation"):
            if getattr(spec, name) is not None:
                yield f"{key}.{name}: not supported with {key}.model {STUDENT_BASE}; remove the key"


def _student(config: RunConfig) -> Iterator[str]:
    student, method, specs = config.student, config.method, config.teacher_specs
    is_cut, has_layers = student.model == FROM_TEACHER, student.layers is not None
    is_new = isinstance(student.model, ScratchModel)
    if is_cut and not (has_layers or method.cuts_student):
        cutting = " or ".join(methods_with("cuts_student"))
        yield f'student.model: "{FROM_TEACHER}": set student.layers, or method.name to {cutting}'
    if method.cuts_student and not is_cut:
        yield f"student.model: method {method.name} cuts its teacher; set it to {FROM_TEACHER}"
    if method.cuts_student and is_cut and has_layers:
        yield f"student.layers: method {method.name} chooses the layers; remove the key"
    if is_new and has_layers:
        yield "student.layers: a model with random weights has no layers to keep; remove the key"
    if getattr(student.layers, "by", None) == "importance" and not is_cut:
        yield (
            "student.layers.by: importance is measured in a teacher; set student.model to "
            f'"{FROM_TEACHER}", or student.layers.by to spacing'
        )
    if student.teacher is not None and not is_cut:
        yield f'student.teacher: applies only to student.model "{FROM_TEACHER}"; remove the key'
    elif student.teacher not in (None, *specs):
        yield no_such_teacher(config, "student.teacher", str(student.teacher))
    elif is_cut and config.teachers and student.teacher is None:
        yield f"student.teacher: missing; set student.teacher to {' or '.join(specs)}"
    if student.lora is None:
        return
    if find_spec("peft") is None:
        yield (
            "student.lora: needs the package peft, which is not installed; install the extra lora "
            "of megakd (pip install 'megakd[lora]'), or remove the section"
        )
    if method.learns_adapters and (is_new or is_cut or has_layers):
        yield "student.lora: needs a whole trained student.model; remove student.layers or lora"


def _deepspeed(config: RunConfig) -> Iterator[str]:
    for where, ds in config.ds_configs.items():
        try:
            load_ds_config(ds, where=where)
        except ConfigError as error:
            yield str(error)


def _objective(config: RunConfig) -> Iterator[str]:
    terms, task = config.objective or (), config.task.type
    for (name, source), count in Counter((term.loss, source_of(term)) for term in terms).items():
        if count > 1:
            on = f" with on: {source}" if source else ""
            yield f'objective: "{name}"{on} is listed {count} times; keep one, and set its weight'
    if terms and not any(term.weight for term in terms):
        yield "objective: every weight is 0; set at least one weight above 0"
    has_teacher = config.method.needs_teacher or config.teacher_specs
    for index, term in enumerate(terms):
        where = f"objective[{index}].loss: {term.loss}"
        if task not in term.tasks:
            tasks = ", ".join(term.tasks)
            yield f"{where} supports only task.type {tasks}, not {task}; remove the term"
            continue
        if term.needs_teacher and not has_teacher:
            yield f"{where} compares with a teacher, and the run has none; remove the term"
        if config.train.tokens_per_rank and _counts_rows(term):
            yield f"{where} is averaged over rows; remove the term or train.tokens_per_rank"
        for name in config.teacher_specs:
            yield from (f"{where} {problem}" for problem in _output_problems(config, name, term))


def _counts_rows(term: Term) -> bool:
    if isinstance(term, HiddenMse | HiddenCosine):
        return term.positions == "first"
    return isinstance(term, RelationFsp) or getattr(term, "unit", None) == "examples"


def _output_problems(config: RunConfig, name: str, term: Term) -> Iterator[str]:
    # A cache or a server, which exclude each other, hold some of a teacher's outputs.
    spec, key = config.teacher_specs[name], config.key_of(name)
    if spec.cache is None and spec.server is None:
        return
    source = f"{key}.cache" if spec.server is None else f"{key}.server"
    held = "the largest probabilities" if spec.cache_draws is None else "random draws"
    is_part = config.task.type == "causal_lm"
    if looks_inside(term):
        yield f"needs more than outputs, which {source} holds; remove {source} or the term"
    elif is_part and isinstance(term, SoftTargetKl) and term.temperature != 1:
        yield f"needs temperature 1, because {source} holds {held}; set temperature to 1"
    elif is_part and term.needs_teacher and not isinstance(term, SoftTargetKl):
        yield f"needs all probabilities, and {source} holds {held}; use soft_target_kl"


def _task(config: RunConfig) -> Iterator[str]:
    task = config.task
    if task.dataset is None and not (task.train_files or task.mixture):
        yield "task.dataset: missing; set it, task.train_files or task.mixture"
    if (task.dataset or "").startswith("glue/"):
        of_others = "text_columns label_column teacher_column dataset_config splits streaming"
        for key, _ in _changed(config, "task", f"{of_others} {_COLUMNS}"):
            yield f"{key}: not supported with task.dataset {task.dataset}; remove the key"
    if task.splits is not None and "train" not in task.splits:
        yield "task.splits: names no split for train; name one, as in {train: train_sft}"
    for name, source in (task.mixture or {}).items():
        if (source.files is None) == (source.dataset is None):
            yield f"task.mixture.{name}.files: must be set, or dataset, and not both"
    if task.completion_column and not (task.prompt_column or task.messages_column):
        yield "task.prompt_column: missing, and task.completion_column is set; set the key too"
    if task.chat_template and not expand_path(task.chat_template).is_file():
        yield f"task.chat_template: the file {task.chat_template} does not exist; give one"


def _labels(config: RunConfig) -> Iterator[str]:
    task, separator = config.task, config.task.label_separator
    joined = [name for name in task.labels or () if separator is not None and separator in name]
    if joined:
        yield (
            f"task.label_separator: {separator!r} is part of the label {joined[0]!r} in "
            "task.labels; use another separator, or write the labels of a row as a list"
        )
    if separator is not None and task.multi_label is False:
        yield "task.multi_label: false, and task.label_separator is set; remove one of the two"
    if task.soft_labels is not None:
        for index, term in enumerate(config.objective or ()):
            if looks_inside(term):
                yield (
                    f"objective[{index}].loss: {term.loss} looks into a teacher, of which "
                    "task.soft_labels has the answers alone; remove the term"
                )
        if config.student.model == FROM_TEACHER and not config.teacher_specs:
            yield "student.model: from_teacher, and the run has no teacher; name a model"
    if not isinstance(task.label_column, tuple):
        return
    if task.type != "classification":
        yield f"task.label_column: several columns are labels of a classifier, not of {task.type}"
    for key in ("label_separator", "labels", "multi_label"):
        if getattr(task, key) not in (None, True):
            yield f"task.{key}: each column of task.label_column is a label; remove the key"


def _stream(config: RunConfig) -> Iterator[str]:
    task = config.task
    if not task.streaming or task.type not in LANGUAGE_TASKS:
        return
    if isinstance(task.tokenizer, TokenizerConfig):
        yield "task.tokenizer: cannot be trained on a stream; set a folder or a Hub id"
    if task.train_files and not (task.validation_files or task.max_eval_examples):
        yield (
            "task.streaming: no share of a stream can be held out; set task.validation_files, or "
            "task.max_eval_examples to hold out its first texts"
        )
    endless = [where for where, train in config.trainings.items() if train.max_steps is None]
    # The other sections inherit the key of `train`.
    for where in endless[:1] if "train" in endless else endless:
        yield f"{where}.max_steps: missing, and a stream (task.streaming) has no end; set the key"


def _trainings(config: RunConfig) -> Iterator[str]:
    task, of_method = config.task, getattr(file_of(config.method), "BASELINES", {})
    known = ("alone", *of_method)
    known = (*known, *UNTRAINED) if task.type == "classification" else known
    if config.alone is not None and "alone" not in config.trained_baselines:
        yield "alone: baselines does not list alone; add baselines: [alone], or remove the section"
    for name in (name for name in config.baselines or () if name not in known):
        near = f"{suggestion(name, known)} (known: {', '.join(known)})"
        yield f'baselines: method "{config.method.name}" has no baseline "{name}"{near}'
    both = [where for where, train in config.trainings.items() if train.bf16 and train.fp16]
    for where in both[:1] if "train" in both else both:
        yield f"{where}: bf16 and fp16 are both true, here or in train; set one to false here"
    for where, train in _sections(config, "trainings").items():
        tokens, length = train.tokens_per_rank, task.max_length or 0
        if tokens is not None and task.type == "causal_lm" and tokens < length:
            least = f"{tokens} is less than task.max_length {length}; raise it"
            yield f"{where}.tokens_per_rank: {least}"
        if tokens is not None and config.train.packing is False:
            yield f"{where}.tokens_per_rank: packs rows, and train.packing is false; remove one"


def _metrics(config: RunConfig) -> Iterator[str]:
    task, known = config.task.type, METRICS[config.task.type]
    listed = {f"metrics[{index}]": name for index, name in enumerate(config.eval.metrics)}
    for key, name in {"metric": config.eval.metric, **listed}.items():
        if name is None or name in known:
            continue
        if not is_metric(name):
            near = f"{suggestion(name, known) or ';'} known: {', '.join(known)}"
            yield f'eval.{key}: task.type {task} has no metric "{name}"{near}'
        elif task in LANGUAGE_TASKS:
            yield f"eval.{key}: {name} needs all outputs at once, which {task} never has; remove it"
        else:
            try:
                metric_of(name)
            except ConfigError as error:
                yield f"eval.{key}: {error}"


def _rollout(config: RunConfig) -> Iterator[str]:
    rollout, teachers = config.rollout, config.teacher_specs
    terms = config.objective or ()
    # Without `on`, a term learns from all texts; without `objective`, the terms have no `on`.
    sources = [source_of(term) for term in terms] or [None]
    if rollout is None:
        if "rollouts" in sources and config.task.type == "causal_lm":
            where = f"objective[{sources.index('rollouts')}].on"
            yield f"{where}: rollouts, and this run generates no texts; add rollout, or remove it"
        return
    by, server, writes_itself = rollout.by, rollout.server, rollout.by == STUDENT
    if not writes_itself and by not in teachers:
        yield no_such_teacher(config, "rollout.by", by)
    elif by in config.base_teachers and server is None:
        yield f"rollout.by: {by} is the student without adapters; set the key to student"
    elif not writes_itself and server is None and teachers[by].server is not None:
        yield f"rollout.by: {by} is not loaded; name its servers in rollout.server (push: none)"
    if server is not None:
        yield from _rollout_server(config, by, server)
    untaught = [] if None in sources else sorted(rollout.draws.difference(sources))
    for source in untaught:
        remedy = f"add a term with on: {source}, or change rollout"
        yield f"objective: no term learns from {source}, which rollout draws; {remedy}"
    for index, (term, source) in enumerate(zip(terms, sources, strict=False)):
        key = f"objective[{index}].on: {source or 'null'}"
        if source not in {None, *rollout.draws} and not untaught:
            yield f"{key}, and with rollout.mix {rollout.mix:g} no step learns from them; remove it"
        is_hard = isinstance(term, HardCrossEntropy) and term.weight > 0
        if is_hard and writes_itself and "rollouts" in rollout.draws and source != "data":
            yield (
                f"{key}, so that {term.loss} would take texts that the student writes as labels; "
                "set on to data with rollout.mix below 1, or remove the term"
            )


def _rollout_server(config: RunConfig, by: str, server: RolloutServerConfig) -> Iterator[str]:
    push = server.push
    if config.served_model is None:
        yield "rollout.server.model: missing, and the config names none; set the served model"
    if push == "adapter" and config.student.lora is None:
        yield "rollout.server.push: adapter needs student.lora; set that section, or push to full"
    if push != "none" and by != STUDENT:
        yield f"rollout.server.push: rollout.by is {by}, which does not learn; set push to none"
    if server.folder is None and push != "none":
        yield f"rollout.server.folder: missing with push: {push}; name one that all servers see"
    if server.folder is not None and push == "none":
        yield "rollout.server.folder: is not used with push: none; remove the key"
