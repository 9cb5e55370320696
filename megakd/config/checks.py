"""Checks across the fields of a run config that need neither data nor models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.config.deepspeed import check_frozen_stage, load_ds_config
from megakd.config.messages import suggestion
from megakd.config.objective import objective_problems
from megakd.config.run import FROM_TEACHER, ScratchModel, listed_files
from megakd.config.training_checks import training_problems
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT, TEACHER
from megakd.contract.terms import STATE_TERMS, AttentionMse, SoftTargetKl, compares, looks_inside
from megakd.errors import ConfigError
from megakd.methods import baselines_of
from megakd.methods.assistants import AssistantOptions
from megakd.methods.knowledge_selection import KnowledgeSelectionConfig
from megakd.methods.minidisc import MiniDiscConfig
from megakd.methods.plugin import PluginMethod
from megakd.methods.single import SingleConfig
from megakd.methods.skdbert import SkdbertConfig
from megakd.methods.takd import TakdConfig

if TYPE_CHECKING:
    from megakd.config.run import RunConfig, TaskConfig
    from megakd.contract.terms import TermConfig


def config_problems(config: RunConfig) -> list[str]:
    """What cannot work whatever the data and models are, one line per problem."""
    pools = (_pool, _cut_teacher, _one_of_several, _in_a_row, _distribution)
    models = (_addresses, _teacher, *pools, _baselines, _assistants, _choice, _layers, _caches)
    checks = (
        *models,
        _precision,
        objective_problems,
        _task,
        _evaluation,
        _deepspeed,
        training_problems,
    )
    return [problem for check in checks for problem in check(config)]


def _addresses(config: RunConfig) -> Iterator[str]:
    """Web and bucket addresses: only local folders and ids of the Hub are read."""
    for key, value in _places(config):
        # A path has lost one of the two slashes.
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            continue
        hub = re.fullmatch(r"https?:/+huggingface\.co/(?:datasets/)?([^/]+/[^/]+)/?", str(value))
        folder = "a local folder" if isinstance(value, Path) else "a local folder or file"
        takes = folder if isinstance(value, Path) else f"{folder}, or an id on the Hugging Face Hub"
        near = f'; write "{hub[1]}"' if hub and not isinstance(value, Path) else ""
        yield f'{key}: "{value}" is an address, and this key takes {takes}{near}'


def _places(config: RunConfig) -> Iterator[tuple[str, str | Path]]:
    """Every setting that names a folder, a model or data, by its key."""
    task, student = config.task, {STUDENT: config.student}
    places: dict[str, Any] = {
        "output_dir": config.output_dir,
        "task.dataset": task.dataset,
        "task.data_dir": task.data_dir,
        "task.tokenizer": task.tokenizer,
    }
    sets = {f"evaluation_sets.{name}": files for name, files in task.evaluation_sets.items()}
    keys = ("train_files", "validation_files", "test_files")
    for key, files in {**{key: getattr(task, key) for key in keys}, **sets}.items():
        places |= {f"task.{key}": path for path in listed_files(files)}
    for name, spec in {**config.teacher_specs, **student}.items():
        places[f"{config.key_of(name)}.model"] = spec.model
        places[f"{config.key_of(name)}.cache"] = getattr(spec, "cache", None)
    return ((key, value) for key, value in places.items() if isinstance(value, str | Path))


def _teacher(config: RunConfig) -> Iterator[str]:
    method = config.method
    learns_alone = method.name == "finetune"
    if isinstance(method, PluginMethod):
        learns_alone = not method.needs_teacher
        yield from method.problems(config)
    if not learns_alone and not config.teacher_specs:
        yield (
            f'teacher: method "{config.method.name}" learns from a teacher and there is none; '
            'set teacher.model, or method.name to "finetune"'
        )
    if config.method.name == "finetune":
        for key in ("teacher", "teachers"):
            if getattr(config, key):
                yield (
                    f'{key}: method "finetune" learns from the labels alone and has no use for a '
                    f'teacher; remove the section ({key}=null), or set method.name to "single"'
                )


def _pool(config: RunConfig) -> Iterator[str]:
    if config.teacher is not None and config.teachers:
        yield (
            "teachers: there is a teacher section too; put that teacher into the list and remove "
            "the section (teacher=null)"
        )
    names = [spec.name for spec in config.teachers]
    for name, count in Counter(names).items():
        if count > 1:
            yield f'teachers: the name "{name}" is given {count} times; every teacher has its own'
    for name in sorted({STUDENT, TEACHER, *config.baselines}.intersection(names)):
        yield f'{config.key_of(name)}.name: "{name}" is what another model of a run is called'


def _cut_teacher(config: RunConfig) -> Iterator[str]:
    if isinstance(config.method, AssistantOptions) and config.teachers:
        yield (
            f'teachers: method "{config.method.name}" cuts one teacher; give it in a section '
            'teacher, or set method.name to "skdbert"'
        )


def _one_of_several(config: RunConfig) -> Iterator[str]:
    method, names = config.method, [spec.name for spec in config.teachers]
    if not isinstance(method, SingleConfig | KnowledgeSelectionConfig):
        return
    if names and method.teacher is None:
        yield (
            f'teachers: method "{method.name}" learns from one of them; set method.teacher to '
            f"{' or '.join(names)}"
        )
    if method.teacher is not None and method.teacher not in config.teacher_specs:
        yield _no_such_teacher(config, "method.teacher", method.teacher)


def _in_a_row(config: RunConfig) -> Iterator[str]:
    order = config.method.order if isinstance(config.method, TakdConfig) else None
    for name, count in Counter(order or ()).items():
        if name not in config.teacher_specs:
            yield _no_such_teacher(config, "method.order", name)
        if count > 1:
            yield f'method.order: "{name}" is listed {count} times'


def _distribution(config: RunConfig) -> Iterator[str]:
    method = config.method
    if not isinstance(method, SkdbertConfig):
        return
    if method.distribution == "weights":
        yield from _weights(config, method.weights)
    elif method.weights is not None:
        yield (
            f"method.weights: method.distribution is {method.distribution}, which takes none; "
            'set it to "weights", or remove them'
        )


def _weights(config: RunConfig, given: Mapping[str, float] | None) -> Iterator[str]:
    if given is None:
        yield 'method.weights: method.distribution is "weights" and there are none'
        return
    for name in given:
        if name not in config.teacher_specs:
            yield _no_such_teacher(config, "method.weights", name)
    missing = [name for name in config.teacher_specs if name not in given]
    if missing:
        yield f"method.weights: none for {', '.join(missing)}; 0 is a weight too"
    elif not any(given.values()):
        yield "method.weights: all are 0, so no teacher could ever be drawn; raise one"


def _no_such_teacher(config: RunConfig, key: str, name: str) -> str:
    known = ", ".join(config.teacher_specs)
    return f'{key}: there is no teacher "{name}"{suggestion(name, config.teacher_specs)} ({known})'


def _baselines(config: RunConfig) -> Iterator[str]:
    if config.alone is not None and "alone" not in config.baselines:
        yield "alone: says how a baseline is trained that is not listed; add baselines: [alone]"
    known = baselines_of(config.method)
    for name, count in Counter(config.baselines).items():
        if name not in known:
            yield (
                f'baselines: method "{config.method.name}" has no baseline "{name}"'
                f"{suggestion(name, known)} ({', '.join(known)})"
            )
        if count > 1:
            yield f'baselines: "{name}" is listed {count} times'


def _assistants(config: RunConfig) -> Iterator[str]:
    method, model = config.method, config.student.model
    if not isinstance(method, AssistantOptions):
        if model == FROM_TEACHER and config.student.layers is None:
            yield (
                f'student.model: "{FROM_TEACHER}" is cut out of the teacher, and method '
                f'"{method.name}" cuts nothing; say which layers the student has '
                '(student.layers), give a model, or set method.name to "minidisc"'
            )
        return
    if config.student.layers is not None:
        yield (
            f'student.layers: method "{method.name}" takes heads and neurons out of all layers; '
            'remove the key, or set method.name to "single"'
        )
    if model != FROM_TEACHER:
        yield (
            f'student.model: method "{method.name}" cuts the student out of the teacher; '
            f'set student.model to "{FROM_TEACHER}"'
        )
    if method.target_sparsity not in method.sparsities:
        grid = ", ".join(f"{sparsity:g}" for sparsity in method.sparsities)
        yield (
            f"method.target_sparsity: {method.target_sparsity:g} is not among method.sparsities "
            f"({grid}); add it there, or choose one of them"
        )
    if any(isinstance(term, AttentionMse) for term in config.objective or ()):
        yield (
            "objective: attention_mse compares attention head by head, and the student has fewer "
            "heads than its teacher; relation_kl works with any number"
        )
    states = [term.loss for term in config.objective or () if isinstance(term, STATE_TERMS)]
    if method.residual and states:
        yield (
            f"objective: {', '.join(states)} compares hidden states of one width, and with "
            "method.residual every candidate's are narrower than its teacher's; relation_kl and "
            "soft targets work, or set method.residual to false"
        )


def _choice(config: RunConfig) -> Iterator[str]:
    method = config.method
    if not isinstance(method, MiniDiscConfig) or method.target_may_win or method.iterations == 1:
        return
    if min(method.sparsities) >= method.target_sparsity:
        yield (
            f"method.target_may_win: false leaves no candidate, for none of method.sparsities is "
            f"below method.target_sparsity {method.target_sparsity:g}; add one, set it to true, or "
            f"set method.iterations to 1"
        )


def _caches(config: RunConfig) -> Iterator[str]:
    cached = [config.key_of(n) for n, spec in config.teacher_specs.items() if spec.cache]
    if not cached:
        return
    task, key = config.task.type, f"{cached[0]}.cache"
    if task == "mlm":
        yield f"{key}: mlm hides other tokens in every epoch, so no answer serves twice; remove it"
    method = config.method
    learns = isinstance(method, KnowledgeSelectionConfig) and method.policy == "learned"
    if isinstance(method, AssistantOptions) or learns:
        yield f'{key}: method "{method.name}" looks into the teacher itself; remove the key'
    for index, term in enumerate(config.objective or ()):
        where = f"objective[{index}].loss: {term.loss}"
        if looks_inside(term):
            yield f"{where} looks into the teacher, and {key} holds its outputs alone"
        elif task == "causal_lm" and compares(term):
            yield from _of_the_largest(term, where, key)


def _of_the_largest(term: TermConfig, where: str, key: str) -> Iterator[str]:
    """What can be told from a teacher's largest probabilities."""
    if not isinstance(term, SoftTargetKl):
        yield f"{where} needs all probabilities of the teacher, and {key} holds the largest"
    elif term.temperature != 1:
        yield (
            f"{where} at temperature {term.temperature:g}: {key} does not say how much the tokens "
            "that it lacks weigh there; set it to 1"
        )


def _layers(config: RunConfig) -> Iterator[str]:
    student = config.student
    if student.layers is not None and isinstance(student.model, ScratchModel):
        yield "student.layers: a model from random weights has none to start from; remove the key"
    if isinstance(student.layers, tuple) and len({*student.layers}) < len(student.layers):
        yield f"student.layers: a layer is listed twice in {list(student.layers)}"
    if student.teacher is not None and student.model != FROM_TEACHER:
        yield f'student.teacher: student.model is not "{FROM_TEACHER}"; remove the key'
    elif student.teacher is not None and student.teacher not in config.teacher_specs:
        yield _no_such_teacher(config, "student.teacher", student.teacher)
    elif student.model == FROM_TEACHER and config.teachers and student.teacher is None:
        names = " or ".join(config.teacher_specs)
        yield f'student.teacher: "{FROM_TEACHER}" can mean each of several; set it to {names}'


def _precision(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.bf16 and train.fp16:
        yield "train: bf16 and fp16 are both true; keep one"
        return
    for name, spec in config.teacher_specs.items():
        if spec.finetune is None:
            continue
        bf16 = train.bf16 if spec.finetune.bf16 is None else spec.finetune.bf16
        fp16 = train.fp16 if spec.finetune.fp16 is None else spec.finetune.fp16
        if bf16 and fp16:
            yield (
                f"{config.key_of(name)}.finetune: bf16 and fp16 are both true, one of them taken "
                "over from train; set the other to false"
            )


def _task(config: RunConfig) -> Iterator[str]:
    task = config.task
    yield from _files(task)
    if task.dataset == "pydocs":
        for key in ("text_columns", "label_column", "dataset_config"):
            if getattr(task, key) is not None:
                yield f"task.{key}: the dataset pydocs takes none; remove the key"
    if task.labelled_examples is not None and task.type in LANGUAGE_TASKS:
        yield (
            "task.labelled_examples: only classification and regression have labels to keep, "
            f"and task.type is {task.type}; remove the key"
        )
    if task.mlm_probability is not None and task.type != "mlm":
        yield (
            "task.mlm_probability: only mlm masks tokens, "
            f"and task.type is {task.type}; remove the key"
        )


def _files(task: TaskConfig) -> Iterator[str]:
    if task.dataset is None and task.train_files is None:
        yield "task.dataset: missing, and it has no default; name data, or task.train_files"
    if task.dataset is not None:
        for key in ("train_files", "validation_files", "test_files"):
            if getattr(task, key) is not None:
                yield (
                    f"task.{key}: task.dataset brings its own splits; remove one of the two (files "
                    "that are only scored can be task.evaluation_sets)"
                )
    elif task.data_dir is not None or task.dataset_config is not None:
        key = "data_dir" if task.data_dir is not None else "dataset_config"
        yield f"task.{key}: goes with task.dataset, and task.train_files is set; remove the key"


def _evaluation(config: RunConfig) -> Iterator[str]:
    if config.eval.keep_best and config.eval.eval_steps is None:
        yield (
            "eval.keep_best: true needs evaluations to choose from; set eval.eval_steps, "
            "or leave keep_best out"
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
            if where in frozen:
                check_frozen_stage(ds, where=where)
        except ConfigError as error:
            yield str(error)
