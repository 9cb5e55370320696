"""The students and the run configs of `mixed_vocabulary.py`.

Text, tasks and the settings of training are those of `homodistil.py`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from homodistil_cases import (
    INITIALIZER_RANGE,
    QUICK,
    Sizes,
    common_sections,
    short_config,
    task_config,
    text_task,
    train_section,
)

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

Config = dict[str, Any]
Text = Literal["books", "pydocs"]
ALONE, PATIENT_KD, VERSION_2 = "alone", "patient_kd", "version_2"
LARGE, TEACHER = "large_alone", "teacher"
ARMS = {
    ALONE: ("method.projections=none", f"baselines=[{PATIENT_KD}]"),
    "dual": ("method.projections=dual",),
    "dual_tables": ("method.projections=dual", "method.embeddings=true"),
    "down": ("method.projections=down",),
    "up": ("method.projections=up",),
    VERSION_2: ("method.version=2",),
}
"""The runs of the small student, with the settings that win over the config `students`."""
SMALL = (ALONE, PATIENT_KD, *(name for name in ARMS if name != ALONE))
"""The models of the small student's shape; `patient_kd` is a baseline of the run `alone`."""
SHAPE = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "max_position_embeddings",
)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BOOK_SIZES = Sizes(evaluations=10, rate=2e-3, task_rate=1e-3)


class Student(NamedTuple):
    """The small student, and how its teacher learns.

    vocabulary: pieces of the student's own vocabulary.
    teacher_steps: steps of the teacher in `version_2`, before the student's.
    teacher_rate: learning rate of the teacher, which is pretrained.
    """

    layers: int = 4
    width: int = 64
    heads: int = 2
    intermediate: int = 256
    vocabulary: int = 2000
    teacher_steps: int = 500
    teacher_rate: float = 1e-4


QUICK_STUDENT = Student(
    layers=QUICK.layers, width=16, heads=2, intermediate=32, vocabulary=200, teacher_steps=5
)


def text_section(given: argparse.Namespace) -> Config:
    """Masked words of the books, or of the docstrings of installed packages.

    All pieces of a word are masked together, so that vocabularies compare by characters.
    """
    sizes: Sizes = given.sizes
    if given.text == "books":
        task = text_task(given.out / "text", sizes.short)
    else:
        task = {"type": "mlm", "dataset": "pydocs", "max_length": sizes.short}
        task["max_eval_examples"] = sizes.task_scored
    return task | {"whole_word_masking": True}


def students_config(given: argparse.Namespace) -> Config:
    """A small student with a vocabulary of its own; each arm overrides the settings of ARMS."""
    student: Student = given.student
    method = {
        "name": "mixed_vocabulary",
        "student_vocabulary": {"type": "wordpiece", "size": student.vocabulary},
    }
    return {
        "task": text_section(given),
        "teacher": {"model": str(given.teacher), "deepspeed": "teacher_zero0"},
        "student": {"model": {"config": small_shape(given)}, "deepspeed": "zero2"},
        "method": method,
        **_training(given),
    }


def arm_overrides(arm: str, student: Student) -> tuple[str, ...]:
    """Return what wins over the config `students`; the teacher learns in all arms but `alone`."""
    learning = {"teacher_learning_rate": student.teacher_rate} if arm != ALONE else {}
    if arm == VERSION_2:
        learning["teacher_steps"] = student.teacher_steps
    return (*ARMS[arm], *(f"method.{key}={value}" for key, value in learning.items()))


def large_config(given: argparse.Namespace) -> Config:
    """A student of the teacher's shape and vocabulary, which learns from random weights."""
    return {
        "task": {**text_section(given), "tokenizer": str(given.teacher)},
        "student": {"model": {"config": large_shape(given.teacher)}, "deepspeed": "zero2"},
        "method": {"name": "finetune"},
        **_training(given),
    }


def small_shape(given: argparse.Namespace) -> Config:
    """The shape of the small student; a table of positions for its short rows is enough."""
    student: Student = given.student
    return {
        "model_type": "bert",
        "num_hidden_layers": student.layers,
        "hidden_size": student.width,
        "intermediate_size": student.intermediate,
        "num_attention_heads": student.heads,
        "max_position_embeddings": given.sizes.short,
        "initializer_range": INITIALIZER_RANGE,
        **NO_DROPOUT,
    }


def large_shape(teacher: Path) -> Config:
    """The shape of the teacher in a folder."""
    there = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    shape = {key: there[key] for key in SHAPE}
    return {**shape, "initializer_range": INITIALIZER_RANGE, **NO_DROPOUT}


def _training(given: argparse.Namespace) -> Config:
    sizes: Sizes = given.sizes
    train = train_section(sizes.short_rows // given.ranks, sizes.steps, sizes.rate)
    every = max(1, sizes.steps // sizes.evaluations)
    return common_sections(train, evaluate_every=every, log_every=max(1, every // 2))


def tiny_teacher_config(given: argparse.Namespace) -> Config:
    """The teacher of `--quick`, which learns the books for a few steps."""
    return short_config(given.out, given)


def own_task_config(task: str, given: argparse.Namespace) -> Config:
    """A finished model learns a task from its labels; the model wins over it."""
    config = task_config(task, given.out, given)
    # Each model is read with the tokenizer in its own folder.
    del config["task"]["tokenizer"]
    return config
