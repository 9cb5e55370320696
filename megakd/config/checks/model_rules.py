"""Checks of the sections `teacher`, `teachers`, `student` and `method`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec

from megakd.config.checks.rules import Case, Rule, conflict, given, only, problems
from megakd.config.deepspeed import check_frozen_stage, check_trained_sharding, load_ds_config
from megakd.config.models import ScratchModel, StudentConfig, TeacherConfig
from megakd.config.run import RunConfig
from megakd.contract.options import no_such_teacher
from megakd.contract.tasks import AUTO, FROM_TEACHER, LANGUAGE_TASKS, STUDENT, STUDENT_BASE, TEACHER
from megakd.errors import ConfigError


def model_problems(config: RunConfig) -> Iterator[str]:
    """Yield the problems of the models, of the method, and of the models' DeepSpeed configs."""
    specs = config.teacher_specs
    yield from problems(_TEACHERS, Case(config, "", config))
    yield from _names(config)
    yield from config.method.problems(config)
    yield from problems(_TEACHER, *(Case(config, config.key_of(n), s) for n, s in specs.items()))
    yield from problems(_STUDENT, Case(config, STUDENT, config.student))
    chosen = config.student.teacher
    if config.student.model == FROM_TEACHER and chosen is not None and chosen not in specs:
        yield no_such_teacher(config, "student.teacher", chosen)
    yield from _deepspeed(config)


_TEACHERS: tuple[Rule[RunConfig], ...] = (
    Rule(
        lambda c: c.method.needs_teacher and not c.config.teacher_specs,
        "teacher",
        'missing, and method "{method}" needs a teacher; set teacher.model, or set method.name to '
        '"finetune"',
    ),
    Rule(
        lambda c: c.config.teacher is not None and c.config.teachers,
        "teachers",
        "teacher is set too; move that teacher into the list and remove the section (teacher=null)",
    ),
)


def _names(config: RunConfig) -> Iterator[str]:
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


def _generates(case: Case[TeacherConfig]) -> bool:
    rollouts = case.config.rollout
    if rollouts is None or rollouts.server is not None or rollouts.by == STUDENT:
        return False
    return case.config.key_of(rollouts.by) == case.key


_TEACHER: tuple[Rule[TeacherConfig], ...] = (
    *given(
        ".cache",
        lambda c: c.task.type == "mlm",
        "task.type mlm masks other tokens in every epoch, so cached outputs cannot be used again; "
        "remove the key",
    ),
    *given(
        ".cache",
        lambda c: c.method.looks_into_teacher and c.item.cache != AUTO,
        'method "{method}" needs more than the outputs of the teacher, and a cache holds only '
        'outputs; remove the key, or set it to "auto"',
    ),
    *given(
        ".cache",
        lambda c: c.config.eval.losses and c.item.cache != AUTO,
        "holds answers to training rows, and eval.losses compares held-out rows; set the key to "
        '"auto", which keeps the teacher for them, or remove eval.losses',
    ),
    *conflict(".cache", "rollout", ", whose texts are not the training rows that it answers"),
    *conflict(".cache", "task.streaming", ", whose rows have no numbers to find their answers by"),
    *given(
        ".cache_draws",
        lambda c: c.item.cache is None,
        "{item.cache_draws}, and the teacher has no cache that keeps draws; set {key}.cache to a "
        "folder, or remove the key",
    ),
    *only(".cache_draws", ("causal_lm",)),
    *only(".server", ("causal_lm",)),
    *conflict(".server", ".cache"),
    *conflict(".server", ".finetune"),
    *given(
        ".server",
        lambda c: not c.method.learns_from_rollouts,
        'method "{method}" uses the model of the teacher itself; set method.name to '
        "{methods[learns_from_rollouts]}, or remove the key",
    ),
    *given(
        ".server",
        lambda c: c.item.served_model is None,
        "the model of the teacher is {item.model!r}, which no server can serve; set {key}.model to "
        "the folder or the id of the served model",
    ),
    Rule(
        lambda c: c.item.server is not None and _generates(c),
        "rollout.by",
        "{config.rollout.by} is not loaded ({key}.server), so it generates no texts; name its "
        "servers in rollout.server with push: none",
    ),
    Rule(
        lambda c: c.item.model == STUDENT_BASE and c.config.student.lora is None,
        ".model",
        '"{item.model}" is the student without its adapters, and student.lora is not set; set '
        "student.lora, or set {key}.model to a model",
    ),
    Rule(
        lambda c: c.item.model == STUDENT_BASE and c.task.type not in LANGUAGE_TASKS,
        ".model",
        '"{item.model}" is supported only for mlm and causal_lm, because the head of a classifier '
        "is trained (task.type is {task.type}); set {key}.model to a model",
    ),
    *given(
        ".finetune .cache .dtype .attn_implementation",
        lambda c: c.item.model == STUDENT_BASE,
        'not supported with {key}.model: "{item.model}"; remove the key',
    ),
)
_STUDENT: tuple[Rule[StudentConfig], ...] = (
    Rule(
        lambda c: (
            c.item.model == FROM_TEACHER and c.item.layers is None and not c.method.cuts_student
        ),
        ".model",
        '"{item.model}" needs a method that cuts the teacher, or the layers to keep (got method '
        '"{method}"); set student.layers, set student.model to a model, or set method.name to '
        "{methods[cuts_student]}",
    ),
    Rule(
        lambda c: c.method.cuts_student and c.item.model != FROM_TEACHER,
        ".model",
        'method "{method}" cuts the student out of its teacher; set student.model to '
        f'"{FROM_TEACHER}"',
    ),
    *given(
        ".layers",
        lambda c: c.method.cuts_student,
        'method "{method}" cuts the student out of its teacher; remove the key, or set method.name '
        'to "single"',
    ),
    *given(
        ".layers",
        lambda c: isinstance(c.item.model, ScratchModel),
        "a model with random weights has no layers to keep; remove the key",
    ),
    Rule(
        lambda c: (
            getattr(c.item.layers, "by", None) == "importance" and c.item.model != FROM_TEACHER
        ),
        ".layers.by",
        "importance is measured in the teacher that the student starts as; set student.model to "
        f'"{FROM_TEACHER}", or student.layers.by to spacing',
    ),
    *given(
        ".teacher",
        lambda c: c.item.model != FROM_TEACHER,
        f'applies only to student.model "{FROM_TEACHER}"; remove the key',
    ),
    Rule(
        lambda c: c.item.model == FROM_TEACHER and c.config.teachers and c.item.teacher is None,
        ".teacher",
        'missing, and student.model "{item.model}" needs one of the teachers; set student.teacher '
        "to {teachers}",
    ),
    *given(
        ".lora",
        lambda c: find_spec("peft") is None,
        "needs the package peft, which is not installed; install the extra lora of megakd (pip "
        "install 'megakd[lora]'), or remove the section",
    ),
    *given(
        ".lora",
        lambda c: not c.method.learns_adapters,
        'method "{method}" needs the weights of the student themselves, and adapters leave them '
        "frozen; remove the section, or set method.name to {methods[learns_adapters]}",
    ),
    *given(
        ".lora",
        lambda c: isinstance(c.item.model, ScratchModel),
        "student.model has random weights, which adapters would leave frozen; set student.model to "
        "a trained model, or remove the section",
    ),
    *given(
        ".lora",
        lambda c: (
            c.method.learns_adapters and (c.item.model == FROM_TEACHER or c.item.layers is not None)
        ),
        "student.model from_teacher and student.layers make a model that has no folder of its own, "
        "and adapters belong to a base model that others can load; set student.model to that model "
        "and remove student.layers, or remove the section",
    ),
)


def _deepspeed(config: RunConfig) -> Iterator[str]:
    used = {"student.deepspeed": (config.student.deepspeed, check_trained_sharding)}
    for name, spec in config.teacher_specs.items():
        key = config.key_of(name)
        used[f"{key}.deepspeed"] = (spec.deepspeed, check_frozen_stage)
        if spec.finetune is not None:
            used[f"{key}.finetune.deepspeed"] = (spec.finetune.deepspeed, check_trained_sharding)
    for where, (given_config, check) in used.items():
        try:
            check(load_ds_config(given_config, where=where), where=where)
        except ConfigError as error:
            yield str(error)
