"""The run config: typed, strict, and without torch, so that `--print-config` is fast."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megakd.config.schedules import ScheduleName
from megakd.contract.tasks import FROM_TEACHER, STUDENT, TEACHER, Dtype, Kernels, TaskType
from megakd.contract.terms import STRICT, Count, Fraction, Positive, TermConfig, Weight
from megakd.methods import MethodConfig

Epochs = Annotated[float, Field(gt=0, le=1e9)]
MicroBatches = Annotated[int, Field(ge=1, le=2**20)]


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        user = path.parts[0]
        raise ValueError(
            f"{user} is the home folder of a user that does not exist (got {str(path)!r}); "
            "give the whole path"
        ) from None


Folder = Annotated[Path, AfterValidator(_expanded)]
"""A path in which `~` is the home folder."""
Checkpoint = Annotated[str, AfterValidator(lambda text: str(_expanded(Path(text))))]


Attention = Literal["varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
"""`varlen` computes packed rows document by document; the others are those of transformers."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer trained on the training text."""

    type: Literal["wordpiece", "bpe", "unigram"]
    vocab_size: Annotated[int, Field(ge=300)] = 8000


Files = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""A path, a pattern such as shards/*.jsonl, or a list of paths and patterns."""


def listed_files(files: Files | None) -> tuple[str, ...]:
    """Return the paths and patterns of a setting as a tuple."""
    return (files,) if isinstance(files, str) else files or ()


def _free_set_name(name: str) -> str:
    if name in ("train", "validation", "test") or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(
            "the name of an evaluation set must consist of letters, digits, -, _ and ., start with "
            f"a letter or digit, and not be train, validation or test (got {name!r})"
        )
    return name


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TaskConfig:
    """The task and its data: either `dataset`, or separate files for every split."""

    type: TaskType
    dataset: str | None = None
    train_files: Files | None = None
    validation_files: Files | None = None
    """None: 5 % of the training rows, chosen by hash."""
    test_files: Files | None = None
    evaluation_sets: dict[Annotated[str, AfterValidator(_free_set_name)], Files] = Field(
        default_factory=dict
    )
    """Further sets by name; all their rows are scored at the end of the run."""
    dataset_config: str | None = None
    """The Hub configuration of `dataset`, if the data set has several configurations."""
    data_dir: Path | None = None
    text_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    label_column: str | None = None
    max_length: Annotated[int, Field(ge=2, le=2**24)] = 128
    """In tokens. Longer texts are truncated; mlm splits them into windows, and causal_lm packs
    texts to this length."""
    tokenizer: str | TokenizerConfig | None = None
    mlm_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """Fraction of the tokens that are predicted; None: 0.15. Only for mlm."""
    whole_word_masking: bool = False
    """Choose all tokens of a word together. Only for mlm."""
    labelled_examples: Count | None = None
    """Keep the labels of this many training rows, chosen by hash; other rows become unlabelled."""
    max_eval_examples: Count | None = None
    """Score at most this many rows of each held-out split, chosen by hash. None: all rows, but at
    most 5000 of a validation split that is cut from the training rows. With streaming and no
    validation split: hold out this many texts from the beginning of the stream."""
    streaming: bool = False
    """Read the training texts during training, without a copy on disk. Only for mlm and
    causal_lm; needs train.max_steps."""
    encoded: Folder | None = None
    """Folder that `megakd encode` has written; the run reads no text."""

    @property
    def data_name(self) -> str:
        """The name of the data: the data set, or the training files."""
        return self.dataset or ", ".join(listed_files(self.train_files))


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ScratchModel:
    """A model that starts from random weights.

    config: keys of the model's Hugging Face config.
    """

    config: dict[str, Any]


def _with_every_key_optional(kind: type, name: str) -> type:
    """Return a dataclass with the keys of another dataclass, all optional."""
    hints = get_type_hints(kind, include_extras=True)
    annotations = {key: hint | None for key, hint in hints.items()}
    body = {"__module__": __name__, "__annotations__": annotations, **dict.fromkeys(hints)}
    return dataclass(config=STRICT, frozen=True, kw_only=True)(type(name, (), body))


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a stage's training, with the names and defaults of Hugging Face's Trainer."""

    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: MicroBatches = 1
    num_train_epochs: Epochs = 3.0
    max_steps: Count | None = None
    """In optimizer steps; overrides num_train_epochs."""
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-5
    lr_scheduler_type: ScheduleName = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Options of the schedule, named as in Transformers: `{num_decay_steps: 100}`."""
    warmup_ratio: Fraction = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """In optimizer steps; overrides warmup_ratio if above 0."""
    weight_decay: Weight = 0.0
    optim: Literal["adamw", "sgd"] = "adamw"
    """sgd keeps no optimizer state, for models whose AdamW moments do not fit into memory."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Weight = 1.0
    """Maximum global gradient norm for clipping; 0 switches clipping off."""
    bf16: bool | None = None
    """None: true on a GPU that has bf16, unless fp16 is set; false on a CPU."""
    fp16: bool = False
    gradient_checkpointing: bool = False
    early_stopping_patience: Count | None = None
    """Stop the stage after this many evaluations in a row without a better score."""
    early_stopping_threshold: Weight = 0.0
    """A score is better if it exceeds the best score by more than this."""
    kernels: Kernels = "auto"
    """Implementation of the losses; all give the same result up to rounding. auto is triton on a
    GPU."""
    resume_from_checkpoint: bool | Checkpoint = True
    collective_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds that a rank waits for the other ranks in a collective of tensors. Waits for rank 0,
    which reads, encodes or writes files, have a limit of 24 hours. Only in `train`."""


if TYPE_CHECKING:

    class TrainOverrides(TrainConfig):
        """Every key of `train`, or None; keys that are not set are inherited."""

else:
    TrainOverrides = _with_every_key_optional(TrainConfig, "TrainOverrides")


@dataclass(config=STRICT, frozen=True, kw_only=True)
class FinetuneOverrides(TrainOverrides):
    """`teacher.finetune`: every key of `train`, and the DeepSpeed config of the fine-tuning."""

    deepspeed: str | dict[str, Any] = "zero2"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen model that the student learns from, with its own DeepSpeed engine."""

    model: str | ScratchModel
    deepspeed: str | dict[str, Any] = "teacher_zero3"
    """Preset name, path or inline mapping; ZeRO 0 (replicated) or 3 (sharded)."""
    dtype: Dtype | None = None
    """None: on a CPU fp32; on a GPU the dtype of the checkpoint, and bf16 for fp32."""
    architecture: Literal["enct5", "t5_encoder"] | None = None
    """Architecture to load a T5 or mT5 checkpoint as; None: enct5."""
    finetune: FinetuneOverrides | None = None
    label_order: Literal["data"] | None = None
    """`data`: generic labels (LABEL_0, …) have the order of the data's labels; None: the order is
    checked."""
    cache: Folder | None = None
    """Folder with the teacher's answers to the training rows, written by launch/cache_teacher.py.
    The student learns from the folder instead of the model."""
    cache_top_k: Count = 64
    """Number of tokens to keep per position; only for language models."""
    micro_batches_per_call: Count | None = None
    """Micro-batches of a step that the teacher answers in one forward. None: at ZeRO 3 as many as
    fit into memory, else 1."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attn_implementation: Attention | None = None
    """None: on a GPU `varlen` for causal_lm in 16 bits, else the choice of transformers."""


def _plain_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        raise ValueError(
            "the name of a teacher must consist of letters, digits, - and _, and start with a "
            f"letter or digit, such as bert-base (got {text!r})"
        )
    return text


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PooledTeacher(TeacherConfig):
    """One of several teachers."""

    name: Annotated[str, AfterValidator(_plain_name)]
    """Name of the teacher in logs, in the report and in the folders of the run."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class StudentConfig:
    """The model that learns."""

    model: str | ScratchModel
    """A folder, a Hub id, a config, or `from_teacher`. With `from_teacher`, the method cuts the
    student out of the teacher, or the student gets some of the teacher's `layers`."""
    layers: Count | Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Numbers of the layers to keep, counted from 1, or how many layers to keep, evenly spaced."""
    teacher: str | None = None
    """Name of the teacher for `from_teacher`, if there are several teachers."""
    deepspeed: str | dict[str, Any] = "zero2"
    architecture: Literal["enct5", "t5_encoder"] | None = None
    """Architecture to load a T5 or mT5 checkpoint as; None: enct5."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attn_implementation: Attention | None = None
    """None: on a GPU `varlen` for causal_lm in 16 bits, else the choice of transformers."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class EvalConfig:
    """Settings of the evaluations on the validation split."""

    eval_steps: Count | None = None
    per_device_eval_batch_size: Count | None = None
    """Rows per rank and forward; results do not depend on this number. None:
    `per_device_train_batch_size` of the stage, or of `train` outside the stages."""
    metric: str | None = None
    """Metric that chooses the best evaluation and is reported; None: the task's main metric."""
    metrics: tuple[str, ...] = ()
    """Further metrics to compute at every evaluation."""
    positive_label: str | None = None
    """The positive label of f1, precision and recall; None: the second of two labels."""
    keep_best: bool | None = None
    """Export the weights of the best evaluation instead of the last step; None: true if eval_steps
    is set."""


def _repository(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        raise ValueError(f"must be a Hub repository of the form user/name (got {text!r})")
    return text


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SaveConfig:
    """Settings of checkpoints, of the upload to the Hub, and of further formats of the student."""

    save_steps: Count = 500
    save_total_limit: Count | None = 2
    push_to_hub: Annotated[str, AfterValidator(_repository)] | None = None
    """Upload final/ to this repository of the Hugging Face Hub, such as user/name."""
    hub_private: bool = False
    """Create the repository as a private repository."""
    int8: bool = False
    """Also write the student with int8 weights, one scale per row, into final/int8/."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LogConfig:
    """Settings of the log during training."""

    logging_steps: Count = 10
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Trackers that get the logged values in addition to metrics.jsonl."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RunConfig:
    """One run, from the teacher to the exported student."""

    output_dir: Folder
    task: TaskConfig
    student: StudentConfig
    method: MethodConfig
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """At most 32 bits, the limit of NumPy's generators."""
    teacher: TeacherConfig | None = None
    teachers: tuple[PooledTeacher, ...] = ()
    """Several teachers, in place of `teacher`."""
    objective: Annotated[tuple[TermConfig, ...], Field(min_length=1)] | None = None
    baselines: tuple[str, ...] = ()
    """Models of the student's shape to train for comparison: `alone`, and the baselines of the
    method."""
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
    alone: TrainOverrides | None = None
    """Settings of the baseline `alone` that differ from `train`."""

    @property
    def teacher_specs(self) -> dict[str, TeacherConfig]:
        """All teachers by name; a single teacher is named `teacher`."""
        single = {} if self.teacher is None else {TEACHER: self.teacher}
        return {**single, **{spec.name: spec for spec in self.teachers}}

    @property
    def start_role(self) -> str:
        """Role whose model the student starts from: `student`, or a teacher for `from_teacher`."""
        if self.student.model != FROM_TEACHER:
            return STUDENT
        return self.student.teacher or TEACHER

    def eval_rows(self, train: TrainConfig | None = None) -> int:
        """Return the number of rows that a rank scores at a time.

        Args:
            train: settings of the stage that is evaluated; None outside the stages.
        """
        rows = self.eval.per_device_eval_batch_size
        return rows or (train or self.train).per_device_train_batch_size

    def key_of(self, role: str) -> str:
        """Return the config key of a model: `student`, `teacher` or, for example, `teachers[2]`.

        Args:
            role: `student`, or a teacher's name.
        """
        names = [spec.name for spec in self.teachers]
        return f"teachers[{names.index(role)}]" if role in names else role


def inherit(train: TrainConfig, overrides: TrainOverrides) -> TrainConfig:
    """Return the settings of `train`, replaced by the keys that `overrides` sets.

    An override of `num_train_epochs` resets an inherited `max_steps`, and an override of
    `warmup_ratio` resets inherited `warmup_steps`, which would otherwise win. An override of
    `lr_scheduler_type` resets inherited `lr_scheduler_kwargs`.

    Args:
        train: settings to inherit.
        overrides: keys of `teacher.finetune` or `alone`.
    """
    given = {k: v for k, v in asdict(overrides).items() if v is not None and k != "deepspeed"}
    if "num_train_epochs" in given and "max_steps" not in given:
        given["max_steps"] = None
    if "warmup_ratio" in given and "warmup_steps" not in given:
        given["warmup_steps"] = 0
    if "lr_scheduler_type" in given and "lr_scheduler_kwargs" not in given:
        given["lr_scheduler_kwargs"] = None
    return dataclasses.replace(train, **given)
