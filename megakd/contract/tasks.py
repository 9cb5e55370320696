"""Names that the config, methods and losses share: tasks, their metrics, number formats, roles."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["fp32", "bf16", "fp16"]
Kernels = Literal["auto", "triton", "chunked", "reference"]
TaskType = Literal["classification", "regression", "mlm", "causal_lm"]
STUDENT = "student"
TEACHER = "teacher"
"""The name of the teacher if the config has only one."""
FROM_TEACHER = "from_teacher"
"""Value of `student.model` for a student that is made of parts of the teacher."""
STUDENT_BASE = "student_base"
"""Value of `teacher.model` for the student without its adapters, with no second model in memory."""
LANGUAGE_TASKS: tuple[TaskType, ...] = ("mlm", "causal_lm")
"""Tasks whose labels are tokens of the text itself."""
ONE_LABEL_METRICS = ("f1", "precision", "recall")
"""Metrics of one label against all others."""
METRICS: dict[TaskType, tuple[str, ...]] = {
    "classification": (
        "accuracy",
        *ONE_LABEL_METRICS,
        "f1_macro",
        "precision_macro",
        "recall_macro",
        "f1_weighted",
        "matthews_correlation",
        "loss",
    ),
    "regression": ("pearson", "spearman", "loss"),
    "mlm": ("perplexity", "loss", "accuracy", "nats_per_character"),
    "causal_lm": ("perplexity", "loss", "accuracy"),
}
"""Allowed values of `eval.metric` by task."""
