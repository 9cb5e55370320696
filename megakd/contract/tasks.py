"""Names that rooms share: tasks, their metrics, number formats, roles, generated texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

Dtype = Literal["fp32", "bf16", "fp16"]
FP8 = "fp8"
"""Value of `teacher.dtype` for bf16 with the linear layers in 8 bits."""
Kernels = Literal["auto", "triton", "chunked", "reference"]
FusedLayers = Literal["auto", "on", "off"]
TaskType = Literal["classification", "regression", "mlm", "causal_lm"]
STUDENT = "student"
TEACHER = "teacher"
"""The name of the teacher if the config has only one."""
FROM_TEACHER = "from_teacher"
"""Value of `student.model` for a student that is made of parts of the teacher."""
AUTO = "auto"
"""Value of `teacher.cache` for answers that the run itself keeps."""
SOFT_LABELS = "soft_labels"
"""The name of a teacher whose answers stand in the training rows, in the column `soft_label`."""
STUDENT_BASE = "student_base"
"""Value of `teacher.model` for the student without its adapters, with no second model in memory."""
TFIDF = "tfidf"
"""The baseline of a classifier that knows the words of a text alone."""
LANGUAGE_TASKS: tuple[TaskType, ...] = ("mlm", "causal_lm")
"""Tasks whose labels are tokens of the text itself."""
ONE_LABEL_METRICS = ("f1", "precision", "recall")
"""Metrics of one label against all others."""
SET_METRICS = ("f1_micro", "f1_macro", "exact_match", "precision_macro", "recall_macro", "loss")
"""Metrics of rows with any number of labels; the first three are always computed."""
THRESHOLD = "threshold"
"""The probability from which a row has a label: a value of an evaluation, and a key of the config
of a model."""
METRICS: dict[TaskType, tuple[str, ...]] = {
    "classification": (
        "accuracy",
        *ONE_LABEL_METRICS,
        "f1_macro",
        "f1_micro",
        "precision_macro",
        "recall_macro",
        "f1_weighted",
        "matthews_correlation",
        "exact_match",
        "loss",
    ),
    "regression": ("pearson", "spearman", "loss"),
    "mlm": ("perplexity", "loss", "accuracy", "nats_per_character"),
    "causal_lm": ("perplexity", "loss", "accuracy"),
}
"""Allowed values of `eval.metric` by task."""


TEXTS = "texts"
"""Folder of the texts that evaluations generate, in the folder of a run."""
MATCH, TEXT_METRIC = "match", "text_"
"""The metric of texts that are compared, and the beginning of the other metrics of texts."""


def file_of_step(folder: Path, step: int) -> Path:
    """Return the file with the texts of one evaluation in the folder of a stage."""
    return folder / f"step-{step:08d}.jsonl"


def is_text_metric(name: str) -> bool:
    """Return whether a metric of an evaluation is about generated texts."""
    return name == MATCH or name.startswith(TEXT_METRIC)
