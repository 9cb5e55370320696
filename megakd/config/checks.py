"""Checks across the fields of a run config that need neither data nor models."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.config.deepspeed import (
    check_frozen_stage,
    check_trained_sharding,
    load_ds_config,
)
from megakd.config.lora_checks import lora_problems
from megakd.config.models import ScratchModel, TeacherConfig
from megakd.config.objective import objective_problems
from megakd.config.paths import looks_like_path
from megakd.config.rollout_checks import rollout_problems
from megakd.config.route_checks import route_problems
from megakd.config.server_checks import server_problems, teacher_server_problems
from megakd.config.task import listed_files
from megakd.config.task_checks import task_problems
from megakd.config.token_budget import token_budget_problems
from megakd.config.training_checks import training_problems
from megakd.contract.options import no_such_teacher
from megakd.contract.tasks import FROM_TEACHER, STUDENT, TEACHER
from megakd.contract.terms import SoftTargetKl, compares, looks_inside
from megakd.errors import ConfigError, suggestion
from megakd.methods import baselines_of, methods_that_cut

if TYPE_CHECKING:
    from megakd.config.run import RunConfig
    from megakd.contract.terms import TermConfig


def config_problems(config: RunConfig) -> list[str]:
    """Return the problems of a config that no data or model can solve, one line per problem."""
    checks = (
        *(_addresses, _teacher, _pool, _method, _baselines, _student, _layers, _caches, _draws),
        objective_problems,
        task_problems,
        lora_problems,
        _evaluation,
        _deepspeed,
        training_problems,
        token_budget_problems,
        rollout_problems,
        route_problems,
        server_problems,
        teacher_server_problems,
    )
    return [problem for check in checks for problem in check(config)]


def _addresses(config: RunConfig) -> Iterator[str]:
    """Yield settings with web or bucket addresses: only local folders and Hub ids are supported."""
    for key, value in _places(config):
        # `Path` has removed one of the two slashes.
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            continue
        hub = re.fullmatch(r"https?:/+huggingface\.co/(?:datasets/)?([^/]+/[^/]+)/?", str(value))
        folder = "a local folder" if isinstance(value, Path) else "a local folder or file"
        takes = folder if isinstance(value, Path) else f"{folder}, or an id on the Hugging Face Hub"
        near = f'; write "{hub[1]}"' if hub and not isinstance(value, Path) else ""
        yield f'{key}: must be {takes} (got the URL "{value}"){near}'


def _places(config: RunConfig) -> Iterator[tuple[str, str | Path]]:
    """Return key and value of every setting that names a folder, a model or data."""
    task, student = config.task, {STUDENT: config.student}
    places: list[tuple[str, Any]] = [
        ("output_dir", config.output_dir),
        ("task.dataset", task.dataset),
        ("task.data_dir", task.data_dir),
        ("task.tokenizer", task.tokenizer),
        ("task.chat_template", task.chat_template),
    ]
    sets = {f"evaluation_sets.{name}": files for name, files in task.evaluation_sets.items()}
    sets |= {f"mixture.{name}.files": part.files for name, part in (task.mixture or {}).items()}
    keys = ("train_files", "validation_files", "test_files")
    for key, files in {**{key: getattr(task, key) for key in keys}, **sets}.items():
        places += [(f"task.{key}", path) for path in listed_files(files)]
    for name, spec in {**config.teacher_specs, **student}.items():
        places.append((f"{config.key_of(name)}.model", spec.model))
        places.append((f"{config.key_of(name)}.cache", getattr(spec, "cache", None)))
    return ((key, value) for key, value in places if isinstance(value, str | Path))


def check_paths(config: RunConfig) -> None:
    """Check, before torch is loaded, that the models and files of a run are on this machine.

    Names that may be the Hub's, and patterns of files, are checked where they are read.

    Raises:
        ConfigError: paths do not exist; one line per path.
    """
    specs = {f"{config.key_of(name)}.model": spec for name, spec in config.teacher_specs.items()}
    unread = {"output_dir", "task.chat_template"}
    unread |= {key for key, spec in specs.items() if spec.cache or spec.server}
    missing = [
        f"{key}: {path} does not exist"
        for key, value in _places(config)
        if key not in unread and not key.endswith(".cache") and _is_local(key, str(value))
        if not (config.task.encoded and key.startswith("task.") and key != "task.tokenizer")
        if not (path := Path(value).expanduser()).exists()
    ]
    if missing:
        count = f"{len(missing)} problems\n  " if len(missing) > 1 else ""
        raise ConfigError(count + "\n  ".join(missing))


def _is_local(key: str, place: str) -> bool:
    """Return true if a setting names a path, and neither a name of the Hub nor a pattern."""
    if glob.has_magic(place):
        return False
    return "files" in key or "evaluation_sets" in key or looks_like_path(place)


def _teacher(config: RunConfig) -> Iterator[str]:
    if config.method.needs_teacher and not config.teacher_specs:
        yield (
            f'teacher: missing, and method "{config.method.name}" needs a teacher; set '
            'teacher.model, or set method.name to "finetune"'
        )


def _method(config: RunConfig) -> Iterator[str]:
    yield from config.method.problems(config)


def _pool(config: RunConfig) -> Iterator[str]:
    if config.teacher is not None and config.teachers:
        yield (
            "teachers: teacher is set too; move that teacher into the list and remove the section "
            "(teacher=null)"
        )
    names = [spec.name for spec in config.teachers]
    for name, count in Counter(names).items():
        if count > 1:
            yield (
                f'teachers: the name "{name}" is used {count} times; give every teacher a '
                "different name"
            )
    for name in sorted({STUDENT, TEACHER, *config.baselines}.intersection(names)):
        yield (
            f'{config.key_of(name)}.name: "{name}" is the name of another model of the run; choose '
            "a different name"
        )


def _baselines(config: RunConfig) -> Iterator[str]:
    if config.alone is not None and "alone" not in config.baselines:
        yield "alone: baselines does not list alone; add baselines: [alone], or remove the section"
    known = baselines_of(config.method)
    for name, count in Counter(config.baselines).items():
        if name not in known:
            yield (
                f'baselines: method "{config.method.name}" has no baseline '
                f'"{name}"{suggestion(name, known)} (known: '
                f"{', '.join(known)})"
            )
        if count > 1:
            yield f'baselines: "{name}" is listed {count} times; list every baseline once'


def _student(config: RunConfig) -> Iterator[str]:
    student, method = config.student, config.method
    if student.model == FROM_TEACHER and student.layers is None and not method.cuts_student:
        cutting = " or ".join(methods_that_cut())
        yield (
            f'student.model: "{FROM_TEACHER}" needs a method that cuts the teacher, or the layers '
            f'to keep (got method "{method.name}"); set student.layers, set student.model to a '
            f"model, or set method.name to {cutting}"
        )
    if config.save.int8 and student.trust_remote_code:
        yield (
            "save.int8: a model with code of its own (student.trust_remote_code) cannot be "
            "restored from int8 weights; remove one of the two keys"
        )


def _caches(config: RunConfig) -> Iterator[str]:
    cached = {f"{config.key_of(n)}.cache": s for n, s in config.teacher_specs.items() if s.cache}
    if not cached:
        return
    task, key = config.task.type, next(iter(cached))
    if task == "mlm":
        yield (
            f"{key}: task.type mlm masks other tokens in every epoch, so cached outputs cannot be "
            "used again; remove the key"
        )
    method = config.method
    if method.looks_into_teacher:
        yield (
            f'{key}: method "{method.name}" needs more than the outputs of the teacher, and a '
            "cache holds only outputs; remove the key"
        )
    for index, term in enumerate(config.objective or ()):
        where = f"objective[{index}].loss: {term.loss}"
        if looks_inside(term):
            yield (
                f"{where} needs more than the outputs of the teacher, and {key} holds only "
                "outputs; remove the key or the term"
            )
        elif task == "causal_lm" and compares(term):
            for own, spec in cached.items():
                yield from _of_a_part(term, where, own, spec)


def _draws(config: RunConfig) -> Iterator[str]:
    for name, spec in config.teacher_specs.items():
        if spec.cache_draws is None:
            continue
        key = config.key_of(name)
        if spec.cache is None:
            yield (
                f"{key}.cache_draws: {spec.cache_draws}, and the teacher has no cache that keeps "
                f"draws; set {key}.cache to a folder, or remove the key"
            )
        if config.task.type != "causal_lm":
            yield (
                f"{key}.cache_draws: applies only to task.type causal_lm (got "
                f"{config.task.type}); remove the key"
            )


def _of_a_part(term: TermConfig, where: str, key: str, spec: TeacherConfig) -> Iterator[str]:
    part = "the largest" if spec.cache_draws is None else "random draws"
    if not isinstance(term, SoftTargetKl):
        yield (
            f"{where} needs all probabilities of the teacher, and {key} holds only {part}; remove "
            "the key or the term"
        )
    elif term.temperature != 1:
        held = f"{part} probabilities" if spec.cache_draws is None else part
        yield (
            f"{where} at temperature {term.temperature:g}: {key} holds only {held}, at "
            f"temperature 1; set temperature to 1, or remove {key}"
        )


def _layers(config: RunConfig) -> Iterator[str]:
    student = config.student
    if student.layers is not None and isinstance(student.model, ScratchModel):
        yield "student.layers: a model with random weights has no layers to keep; remove the key"
    if isinstance(student.layers, tuple) and len({*student.layers}) < len(student.layers):
        yield (
            f"student.layers: a layer is listed twice in {list(student.layers)}; list every layer "
            "once"
        )
    if getattr(student.layers, "by", None) == "importance" and student.model != FROM_TEACHER:
        yield (
            "student.layers.by: importance is measured in the teacher that the student starts as; "
            f'set student.model to "{FROM_TEACHER}", or student.layers.by to spacing'
        )
    if student.teacher is not None and student.model != FROM_TEACHER:
        yield f'student.teacher: applies only to student.model "{FROM_TEACHER}"; remove the key'
    elif student.teacher is not None and student.teacher not in config.teacher_specs:
        yield no_such_teacher(config, "student.teacher", student.teacher)
    elif student.model == FROM_TEACHER and config.teachers and student.teacher is None:
        names = " or ".join(config.teacher_specs)
        yield (
            f'student.teacher: missing, and student.model "{FROM_TEACHER}" needs one of the '
            f"teachers; set student.teacher to {names}"
        )


def _evaluation(config: RunConfig) -> Iterator[str]:
    if config.eval.keep_best and config.eval.eval_steps is None:
        yield (
            "eval.keep_best: true needs evaluations during training; set eval.eval_steps, or "
            "remove the key"
        )
    latency, longest = config.eval.latency, config.task.max_length
    if latency and latency.tokens and longest and latency.tokens > longest:
        yield (
            f"eval.latency.tokens: {latency.tokens} is longer than the texts of the run "
            f"(task.max_length {longest}); lower the number, or raise task.max_length"
        )


def _deepspeed(config: RunConfig) -> Iterator[str]:
    used = {"student.deepspeed": config.student.deepspeed}
    frozen = {f"{config.key_of(name)}.deepspeed" for name in config.teacher_specs}
    for name, spec in config.teacher_specs.items():
        key = config.key_of(name)
        used[f"{key}.deepspeed"] = spec.deepspeed
        if spec.finetune is not None:
            used[f"{key}.finetune.deepspeed"] = spec.finetune.deepspeed
    for where, given in used.items():
        try:
            ds = load_ds_config(given, where=where)
            check = check_frozen_stage if where in frozen else check_trained_sharding
            check(ds, where=where)
        except ConfigError as error:
            yield str(error)
