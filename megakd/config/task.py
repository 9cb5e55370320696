"""The section `task` of a run config, and the names that sections share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic.dataclasses import dataclass

from megakd.config.paths import Place
from megakd.config.terms import EACH_ONCE, STRICT, Count, as_tuple, matching

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

FROZEN = "frozen"
"""The baseline of a linear classifier on the vectors of a pretrained model as it is."""

UNTRAINED = (TFIDF, FROZEN)
"""The baselines that are no models of the student's shape."""

LANGUAGE_TASKS: tuple[TaskType, ...] = ("mlm", "causal_lm")
"""Tasks whose labels are tokens of the text itself."""

ONE_LABEL_METRICS = ("f1", "precision", "recall")
"""Metrics of one label against all others."""

SET_METRICS = ("f1_micro", "f1_macro", "exact_match", "precision_macro", "recall_macro", "loss")
"""Metrics of rows with any number of labels; the first three are always computed."""

THRESHOLD = "threshold"
"""The probability from which a row has a label: a value of an evaluation, and a key of the config
of a model."""

STANDARD_ERROR = "_standard_error"
"""End of the keys of the standard errors of scores that are shares of rows."""

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


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer trained on the training text."""

    type: Literal["wordpiece", "bpe"]
    vocab_size: Annotated[int, Field(ge=300)] = 8000


Files = Place | Annotated[tuple[Place, ...], Field(min_length=1)]
"""A path, a pattern such as shards/*.jsonl, or a list of paths and patterns."""


Columns = Annotated[tuple[str, ...], Field(min_length=1, max_length=2), BeforeValidator(as_tuple)]


def listed_files(files: Files | None) -> tuple[str, ...]:
    """Return the paths and patterns of a setting as a tuple."""
    return (files,) if isinstance(files, str) else files or ()


def _free_name(kind: str) -> AfterValidator:
    return matching(
        r"(?!(train|validation|test)\Z)[A-Za-z0-9][\w.-]*",
        f"the name of {kind} must consist of letters, digits, -, _ and ., start with a letter or "
        "digit, and not be train, validation or test",
    )


MOST_TOKENS = 2**24


def _length(value: object, info: ValidationInfo) -> object:
    return 128 if value is None and info.data.get("type") != "causal_lm" else value


@dataclass(config=STRICT, frozen=True, kw_only=True)
class MixtureSource:
    """One source of a mixture: its files or Hub data set, and its share of the training rows."""

    files: Files | None = None
    dataset: Place | None = None
    """A data set of the Hub, or a folder of one, in place of files."""
    dataset_config: str | None = None
    revision: str | None = None
    split: str = "train"
    """A split of `dataset`, or a part of it, such as `train[:10%]`."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Relative to the sum of all weights."""
    teacher: str | None = None
    """Name of the teacher of all rows of this source, in place of `task.teacher_column`. Only for
    method routed."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TaskConfig:
    """The task and its data: either `dataset`, or separate files for every split."""

    type: TaskType
    dataset: Place | None = None
    train_files: Files | None = None
    validation_files: Files | None = None
    """None: 5 % of the training rows, chosen by hash."""
    test_files: Files | None = None
    mixture: dict[Annotated[str, _free_name("a source of a mixture")], MixtureSource] | None = None
    """Several sources of training rows by name, in place of `train_files`; an epoch has rows of
    every source in proportion to its weight. Only for causal_lm."""
    evaluation_sets: dict[Annotated[str, _free_name("an evaluation set")], Files] = Field(
        default_factory=dict
    )
    """Further sets by name; all their rows are scored at the end of the run."""
    dataset_config: str | None = None
    """The Hub configuration of `dataset`, if the data set has several configurations."""
    revision: str | None = None
    """A branch, tag or commit of the Hub data set."""
    splits: dict[Literal["train", "validation", "test"], str] | None = None
    """The splits of the Hub data set to use, or parts of them: `{train: "train_sft[:20000]",
    validation: test_sft}`. None: those that are named `train`, `validation` and `test`."""
    text_columns: Columns | None = None
    """A column, or two with the texts of a pair; None: the usual names."""
    label_column: str | Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    """Column with the label of a row, or with a list of labels; several columns of 0 and 1 are a
    label each (classification)."""
    label_separator: Annotated[str, Field(min_length=1)] | None = None
    """Text between the labels of a row with several, such as a comma. Only for classification."""
    labels: Annotated[tuple[str, ...], Field(min_length=2), EACH_ONCE] | None = None
    """Names of all labels, in the order of the model's outputs. None: those of the data. Only for
    classification."""
    multi_label: bool | None = None
    """Whether a row has any number of labels. None: if its labels are lists, joined by
    `label_separator`, or several columns. Only for classification."""
    soft_labels: str | None = None
    """Column of the training rows with the answers of a teacher of one's own: the probabilities of
    the labels as a list in their order, or by label. Only for classification, without `teacher`."""
    teacher_column: str | None = None
    """Column with the name of the teacher that a training row learns from. Only for method
    routed."""
    messages_column: str | None = None
    """Column with lists of messages. None: `messages` or `conversations`. Only for causal_lm."""
    prompt_column: str | None = None
    """Column with prompts, texts or lists of messages. None: `prompt`. Only for causal_lm."""
    completion_column: str | None = None
    """Column with the answers to the prompts. None: `completion`. Only for causal_lm."""
    as_messages: bool = False
    """Make conversations of texts, which the chat template renders: of `prompt_column` and
    `completion_column`, or else of `prompt` and `completion`, `question` and `answer`, or
    `instruction`, `input` and `output`. Only for causal_lm."""
    chat_template: Place | None = None
    """File with a chat template in Jinja. None: the tokenizer's. Only for causal_lm."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the chat template, such as `enable_thinking: false`. A column of the
    same name overrides them row by row. Only for causal_lm."""
    reasoning: Literal["keep", "strip"] = "keep"
    """strip: remove <think>…</think> and `reasoning_content` from answers. Only for causal_lm."""
    train_on: Literal["all", "last", "each"] = "all"
    """The answers of a conversation whose tokens count. each: a row for every answer, that ends
    with it; all: likewise, where a chat template rewrites earlier answers. Only for causal_lm."""
    truncation: Literal["keep_start", "drop"] = "keep_start"
    """What happens to a conversation of more than max_length tokens. Only for causal_lm."""
    end_tokens: Literal["check", "accept"] = "check"
    """accept: allow a teacher that ends its answers with another token, and answers without an
    end token. Only for causal_lm with conversations."""
    bad_rows: Literal["error", "drop"] = "error"
    """What happens to rows that cannot be read or encoded. drop: leave them out and count them."""
    max_length: Annotated[
        Annotated[int, Field(ge=2, le=MOST_TOKENS)] | None,
        BeforeValidator(_length),
        Field(validate_default=True),
    ] = None
    """In tokens. Longer texts are truncated; mlm splits them into windows, and causal_lm packs
    texts to this length. None: 128, and for causal_lm the length of 99 % of the training rows."""
    tokenizer: Place | TokenizerConfig | None = None
    mlm_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the tokens that are predicted; None: 0.15. Only for mlm."""
    labelled_examples: Count | None = None
    """Keep the labels of this many training rows, chosen by hash; other rows become unlabelled."""
    max_eval_examples: Count | None = None
    """Score at most this many rows of each held-out split, chosen by hash. None: all rows, but at
    most 5000 of a validation split that is cut from the training rows. With streaming and no
    validation split: hold out this many texts from the beginning of the stream."""
    streaming: bool = False
    """Read the training texts during training, without a copy on disk. Only for mlm and
    causal_lm; needs train.max_steps."""

    @property
    def row_length(self) -> int:
        """`max_length` of a task whose rows have been measured; see `inputs.with_data`."""
        if self.max_length is None:
            raise ValueError("task.max_length is null, and the rows have not been measured")
        return self.max_length

    @property
    def looks_for_conversations(self) -> bool:
        """Whether a table may have columns of conversations."""
        return self.type == "causal_lm" and self.text_columns is None

    def files(self) -> Iterator[tuple[str, str]]:
        """Yield the keys of the files that the task names, with each file or pattern."""
        named = {
            f"{split}_files": getattr(self, f"{split}_files")
            for split in ("train", "validation", "test")
        }
        named |= {f"evaluation_sets.{name}": files for name, files in self.evaluation_sets.items()}
        named |= {
            f"mixture.{name}.files": part.files for name, part in (self.mixture or {}).items()
        }
        for key, files in named.items():
            yield from ((f"task.{key}", file) for file in listed_files(files))

    @property
    def data_name(self) -> str:
        """The name of the data: the data set, the training files, or the sources of a mixture."""
        return self.dataset or ", ".join(listed_files(self.train_files) or self.mixture or ())
