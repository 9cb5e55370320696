"""Checks of the section `task` (data, conversations, streams, teachers of rows) and of paths."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from megakd.config.checks.rules import Case, Rule, conflict, given, only, problems
from megakd.config.paths import looks_like_path
from megakd.config.run import RunConfig
from megakd.config.task import MixtureSource, TaskConfig, TokenizerConfig, listed_files
from megakd.contract.options import no_such_teacher
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT
from megakd.errors import ConfigError
from megakd.process.terminal import in_home


def task_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of the task and its data."""
    task = config.task
    case = Case(config, "task", task)
    yield from problems(_DATA, case)
    if task.type == "causal_lm":
        yield from problems(_CONVERSATIONS, case)
    if task.streaming and task.type in LANGUAGE_TASKS:
        yield from problems(_STREAM, case)
        yield from _steps(config)
    sources = (task.mixture or {}).items()
    cases = [Case(config, f"task.mixture.{name}", source) for name, source in sources]
    yield from problems(_UNROUTED, case, *cases)
    if config.method.routes_rows:
        yield from problems(_ROUTED, case)
        yield from problems(_ROUTED_SOURCE, *cases)
        named = {f"{c.key}.teacher": c.item.teacher for c in cases if c.item.teacher is not None}
        for key, name in named.items():
            if name not in config.teacher_specs:
                yield no_such_teacher(config, key, name)


def _is_glue(task: TaskConfig) -> bool:
    return (task.dataset or "").startswith("glue/")


_DATA: tuple[Rule[TaskConfig], ...] = (
    Rule(
        lambda c: not any(c.is_set(key) for key in (".dataset", ".train_files", ".mixture")),
        ".dataset",
        "missing, and it has no default; set task.dataset or task.train_files, or task.mixture for "
        "several sources",
    ),
    *conflict(
        ".train_files .validation_files .test_files .mixture",
        ".dataset",
        ", which has its own splits (task.evaluation_sets takes files that are only scored)",
    ),
    *given(
        ".dataset_config",
        lambda c: c.item.dataset is None,
        "supported only with task.dataset, which is not set; remove the key",
    ),
    *given(
        ".text_columns .label_column .dataset_config "
        ".messages_column .prompt_column .completion_column",
        lambda c: _is_glue(c.item),
        "not supported with task.dataset {task.dataset}, which has its own columns; remove the key",
    ),
    *only(".labelled_examples", ("classification", "regression")),
    *only(".mlm_probability", ("mlm",)),
    *only(".streaming", LANGUAGE_TASKS),
    *only(
        ".messages_column .prompt_column .completion_column .chat_template .chat_template_kwargs "
        ".reasoning .train_on .truncation .end_tokens .mixture",
        ("causal_lm",),
    ),
)
_CONVERSATIONS: tuple[Rule[TaskConfig], ...] = (
    *conflict(
        ".messages_column .prompt_column .completion_column",
        ".text_columns",
        ", which names the columns of documents",
    ),
    *conflict(
        ".prompt_column .completion_column",
        ".messages_column",
        ", whose messages hold the prompts and the answers",
    ),
    Rule(
        lambda c: (
            c.is_set(".completion_column")
            and not (c.is_set(".prompt_column") or c.is_set(".messages_column"))
        ),
        ".prompt_column",
        "missing, and task.completion_column is set; name the column of the prompts",
    ),
    Rule(
        lambda c: c.item.chat_template and not in_home(c.item.chat_template).is_file(),
        ".chat_template",
        "the file {item.chat_template} does not exist; give a file with a chat template in Jinja, "
        "or remove the key to use the tokenizer's",
    ),
    Rule(
        lambda c: c.item.mixture == {},
        ".mixture",
        "has no source; name at least one source with files and weight",
    ),
    *conflict(".mixture", ".train_files"),
    *conflict(
        ".mixture", ".streaming", ", because the rows of a source are counted before training"
    ),
)
_STREAM: tuple[Rule[TaskConfig], ...] = (
    Rule(
        lambda c: _is_glue(c.item),
        ".streaming",
        "task.dataset {task.dataset} is small and is always read before training; remove the key, "
        "or name files or a data set of the Hub",
    ),
    Rule(
        lambda c: (
            c.is_set(".train_files") and not (c.item.validation_files or c.item.max_eval_examples)
        ),
        ".streaming",
        "a stream has no end, so no share of it can be held out; set task.validation_files, or set "
        "task.max_eval_examples to hold out this many texts from the beginning of task.train_files",
    ),
    Rule(
        lambda c: isinstance(c.item.tokenizer, TokenizerConfig),
        ".tokenizer",
        "a {task.tokenizer.type} cannot be trained on a stream (task.streaming is true); set a "
        "folder or a Hub id, or train the tokenizer in a run without task.streaming on a part of "
        "the text",
    ),
)


def _steps(config: RunConfig) -> Iterator[str]:
    unlimited = [where for where, train in config.trainings.items() if train.max_steps is None]
    # The other sections inherit the key of `train`.
    for where in unlimited[:1] if "train" in unlimited else unlimited:
        yield (
            f"{where}.max_steps: missing, and task.streaming is true: a stream has no end, so "
            f"num_train_epochs says nothing about its length; set {where}.max_steps, or remove "
            "task.streaming"
        )


_UNROUTED: tuple[Rule[TaskConfig | MixtureSource], ...] = given(
    ".teacher_column .teacher",
    lambda c: not c.method.routes_rows,
    'method "{method}" does not choose teachers by row; set method.name to {methods[routes_rows]}, '
    "or remove the key",
)


_ROUTED: tuple[Rule[TaskConfig], ...] = (
    Rule(
        lambda c: (
            c.item.teacher_column is None
            and not any(source.teacher for source in (c.item.mixture or {}).values())
        ),
        ".teacher_column",
        "missing, and every training row has to name its teacher; set the key, or, in a mixture, "
        "set task.mixture.<name>.teacher of every source",
    ),
    *given(
        ".teacher_column",
        lambda c: c.item.mixture and all(s.teacher for s in c.item.mixture.values()),
        "is not read, because every source of task.mixture names its teacher; remove one of the "
        "two",
    ),
    Rule(
        lambda c: _is_glue(c.item),
        ".dataset",
        "the rows of {task.dataset} name no teachers, which method {method} needs; use files, a "
        "folder or a data set of the Hub with a column of teachers",
    ),
    *given(
        ".streaming",
        lambda c: True,
        "not supported by method {method}, which counts the rows of each teacher before training; "
        "remove the key",
    ),
    Rule(
        lambda c: c.config.eval.losses,
        "eval.losses",
        "compares held-out rows with the teachers, and only training rows name a teacher (method "
        "{method}); remove the key",
    ),
)
_ROUTED_SOURCE: tuple[Rule[MixtureSource], ...] = (
    Rule(
        lambda c: (
            c.item.teacher is None
            and c.task.teacher_column is None
            and any(source.teacher for source in (c.task.mixture or {}).values())
        ),
        ".teacher",
        "missing, and every training row has to name its teacher; set the key, or set "
        "task.teacher_column for this source",
    ),
)


def address_problems(config: RunConfig) -> Iterator[str]:
    """Yield settings that name nothing, or an address: only folders and Hub ids are supported."""
    for key, value in places(config):
        if value == "":  # the working directory, if it were read as a path
            yield f'{key}: names nothing (got ""); give a name, or remove the key'
        # `Path` has removed one of the two slashes.
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            continue
        hub = re.fullmatch(r"https?:/+huggingface\.co/(?:datasets/)?([^/]+/[^/]+)/?", str(value))
        folder = "a local folder" if isinstance(value, Path) else "a local folder or file"
        takes = folder if isinstance(value, Path) else f"{folder}, or an id on the Hugging Face Hub"
        near = f'; write "{hub[1]}"' if hub and not isinstance(value, Path) else ""
        yield f'{key}: must be {takes} (got the URL "{value}"){near}'


def check_paths(config: RunConfig) -> None:
    """Check, before torch is loaded, that the models and files of a run are on this machine.

    Names that may be the Hub's, and patterns of files, are checked where they are read.
    """
    specs = {f"{config.key_of(name)}.model": spec for name, spec in config.teacher_specs.items()}
    unread = {"output_dir", "task.chat_template"}
    unread |= {key for key, spec in specs.items() if isinstance(spec.cache, Path) or spec.server}
    missing = [
        f"{key}: {path} does not exist"
        for key, value in places(config)
        if key not in unread and not key.endswith(".cache") and _is_local(key, str(value))
        if not (path := in_home(value)).exists()
    ]
    if missing:
        count = f"{len(missing)} problems\n  " if len(missing) > 1 else ""
        raise ConfigError(count + "\n  ".join(missing))


def places(config: RunConfig) -> Iterator[tuple[str, str | Path]]:
    """Yield the keys of a run's folders, models and data, with what they name."""
    task = config.task
    places: dict[str, object] = {"output_dir": config.output_dir}
    for key in ("dataset", "tokenizer", "chat_template"):
        places[f"task.{key}"] = getattr(task, key)
    files = {key: getattr(task, key) for key in ("train_files", "validation_files", "test_files")}
    files |= {f"evaluation_sets.{name}": paths for name, paths in task.evaluation_sets.items()}
    files |= {f"mixture.{name}.files": part.files for name, part in (task.mixture or {}).items()}
    yield from ((key, value) for key, value in places.items() if isinstance(value, str | Path))
    for key, paths in files.items():
        yield from ((f"task.{key}", path) for path in listed_files(paths))
    for name, spec in {**config.teacher_specs, STUDENT: config.student}.items():
        for key, value in {"model": spec.model, "cache": getattr(spec, "cache", None)}.items():
            if isinstance(value, str | Path):
                yield f"{config.key_of(name)}.{key}", value


def _is_local(key: str, place: str) -> bool:
    return not glob.has_magic(place) and (names_files(key) or looks_like_path(place))


def names_files(key: str) -> bool:
    """Return whether a key names files, never anything on the Hub."""
    return "files" in key or "evaluation_sets" in key
