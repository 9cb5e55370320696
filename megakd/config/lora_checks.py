"""Checks of the section `student.lora` that need neither data nor models."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from megakd.config.models import ScratchModel
from megakd.contract.tasks import FROM_TEACHER, LANGUAGE_TASKS, STUDENT_BASE
from megakd.methods import methods_with_adapters

if TYPE_CHECKING:
    from megakd.config.run import RunConfig


def lora_problems(config: RunConfig) -> Iterator[str]:
    """Yield the settings that a student with low-rank adapters cannot be combined with."""
    yield from _base_teachers(config)
    student, method = config.student, config.method
    if student.lora is None:
        return
    if find_spec("peft") is None:
        yield (
            "student.lora: needs the package peft, which is not installed; install the extra lora "
            "of megakd (pip install 'megakd[lora]'), or remove the section"
        )
    if not method.learns_adapters:
        yield (
            f'student.lora: method "{method.name}" needs the weights of the student themselves, '
            "and adapters leave them frozen; remove the section, or set method.name to "
            f"{' or '.join(methods_with_adapters())}"
        )
    if isinstance(student.model, ScratchModel):
        yield (
            "student.lora: student.model has random weights, which adapters would leave frozen; "
            "set student.model to a trained model, or remove the section"
        )
    if student.model == FROM_TEACHER or student.layers is not None:
        key = "model" if student.layers is None else "layers"
        yield (
            f"student.lora: student.{key} makes a model that has no folder of its own, and "
            "adapters belong to a base model that others can load; set student.model to that "
            "model and remove student.layers, or remove the section"
        )
    if config.save.int8:
        yield (
            "save.int8: not supported with student.lora, because the base model stays in its "
            "number format; remove one of the two keys"
        )


def _base_teachers(config: RunConfig) -> Iterator[str]:
    for name in config.base_teachers:
        key, spec = config.key_of(name), config.teacher_specs[name]
        where = f'{key}.model: "{STUDENT_BASE}"'
        if config.student.lora is None:
            yield (
                f"{where} is the student without its adapters, and student.lora is not set; set "
                f"student.lora, or set {key}.model to a model"
            )
        if config.task.type not in LANGUAGE_TASKS:
            yield (
                f"{where} is supported only for {' and '.join(LANGUAGE_TASKS)}, because the head "
                f"of a classifier is trained (task.type is {config.task.type}); set {key}.model "
                "to a model"
            )
        for other in ("finetune", "cache", "dtype", "attn_implementation"):
            if getattr(spec, other) is not None:
                yield f"{key}.{other}: not supported with {where}; remove the key"
