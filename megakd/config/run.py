"""The run config: typed, strict, and free of torch, so that `--print-config` answers at once."""

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


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TokenizerConfig:
    """A tokenizer trained on the training text."""

    type: Literal["wordpiece", "bpe", "unigram"]
    vocab_size: Annotated[int, Field(ge=300)] = 8000


Files = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""A path, a pattern such as shards/*.jsonl, or several of them."""


def listed_files(files: Files | None) -> tuple[str, ...]:
    """The paths and patterns of a setting."""
    return (files,) if isinstance(files, str) else files or ()


def _free_set_name(name: str) -> str:
    if name in ("train", "validation", "test") or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(
            "an evaluation set's name has letters, digits, -, _ and . alone and is not train, "
            f"validation or test; got {name!r}"
        )
    return name


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TaskConfig:
    """What is learned, and from which data: `dataset`, or files of its own for every split."""

    type: TaskType
    dataset: str | None = None
    train_files: Files | None = None
    validation_files: Files | None = None
    """None: 5 % of the training rows are cut off by hash."""
    test_files: Files | None = None
    evaluation_sets: dict[Annotated[str, AfterValidator(_free_set_name)], Files] = Field(
        default_factory=dict
    )
    """Further sets by name, scored whole at the end of the run."""
    dataset_config: str | None = None
    """The Hub configuration of `dataset`, where it has several."""
    data_dir: Path | None = None
    text_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    label_column: str | None = None
    max_length: Annotated[int, Field(ge=2, le=2**24)] = 128
    """In tokens; longer texts are cut (mlm: into windows; causal_lm: packed to this length)."""
    tokenizer: str | TokenizerConfig | None = None
    mlm_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the tokens that are predicted; None: 0.15. For mlm alone."""
    labelled_examples: Count | None = None
    """Keep the labels of this many training rows, chosen by hash; the others stay unlabelled."""
    max_eval_examples: Count | None = None
    """Score at most this many rows of each held-out split, chosen by hash."""

    @property
    def data_name(self) -> str:
        """The data in words: the data set, or the training files."""
        return self.dataset or ", ".join(listed_files(self.train_files))


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ScratchModel:
    """A model that starts from random weights: the keys of its Hugging Face config."""

    config: dict[str, Any]


def _with_every_key_optional(kind: type, name: str) -> type:
    """Return a dataclass with the keys of another one, each of which may be left out."""
    hints = get_type_hints(kind, include_extras=True)
    annotations = {key: hint | None for key, hint in hints.items()}
    body = {"__module__": __name__, "__annotations__": annotations, **dict.fromkeys(hints)}
    return dataclass(config=STRICT, frozen=True, kw_only=True)(type(name, (), body))


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """How a stage is trained; names and defaults are Hugging Face's."""

    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: MicroBatches = 1
    num_train_epochs: Epochs = 3.0
    max_steps: Count | None = None
    """In optimiser steps; wins over num_train_epochs."""
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-5
    lr_scheduler_type: ScheduleName = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Options of the schedule, named as in Transformers: `{num_decay_steps: 100}`."""
    warmup_ratio: Fraction = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """In optimiser steps; wins over warmup_ratio when above 0."""
    weight_decay: Weight = 0.0
    optim: Literal["adamw", "sgd"] = "adamw"
    """sgd keeps no state at all: for a model whose moments would not fit."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Positive = 1e-8
    max_grad_norm: Weight = 1.0
    """Clips the global gradient norm; 0 switches clipping off."""
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool = False
    early_stopping_patience: Count | None = None
    """In evaluations: stop the stage after this many in a row without a better score."""
    early_stopping_threshold: Weight = 0.0
    """A score counts as better if it exceeds the best one by more than this."""
    kernels: Kernels = "auto"
    """Which code computes the losses, all alike up to rounding; auto is triton on a GPU."""
    resume_from_checkpoint: bool | str = True


if TYPE_CHECKING:

    class TrainOverrides(TrainConfig):
        """Every key of `train`, or None; those left out are inherited."""

else:
    TrainOverrides = _with_every_key_optional(TrainConfig, "TrainOverrides")


@dataclass(config=STRICT, frozen=True, kw_only=True)
class FinetuneOverrides(TrainOverrides):
    """`teacher.finetune`: every key of `train`, and the engine of the teacher while it learns."""

    deepspeed: str | dict[str, Any] = "zero2"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen model that is learned from, and its own DeepSpeed engine."""

    model: str | ScratchModel
    deepspeed: str | dict[str, Any] = "teacher_zero3"
    """Preset name, path or inline; a frozen model is at ZeRO 0 (replicated) or 3 (sharded)."""
    dtype: Dtype | None = None
    """None: as stored on a GPU, fp32 on a CPU."""
    architecture: Literal["enct5", "t5_encoder"] | None = None
    """What a T5 or mT5 checkpoint is read as; None: enct5."""
    finetune: FinetuneOverrides | None = None
    label_order: Literal["data"] | None = None
    """`data`: generic labels (LABEL_0, …) are in the order of the data's; None: that is checked."""
    cache: Path | None = None
    """A folder with its answers to the training rows, from launch/cache_teacher.py, that the
    student learns from in place of the model."""
    cache_top_k: Count = 64
    """Of a language model, how many tokens of every position are kept."""
    trust_remote_code: bool = False
    allow_pickle: bool = False


def _plain_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        raise ValueError(
            f"a teacher's name has letters, digits, - and _ alone, such as bert-base; got {text!r}"
        )
    return text


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PooledTeacher(TeacherConfig):
    """One of several teachers."""

    name: Annotated[str, AfterValidator(_plain_name)]
    """Names it in logs, in the report and in the folders of the run."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class StudentConfig:
    """The model that learns."""

    model: str | ScratchModel
    """A folder, a Hub id, a config, or `from_teacher`: cut out of the teacher by the method, or
    some of its `layers`."""
    layers: Count | Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Which layers of the model to start from, counted from 1, or how many, spread evenly."""
    teacher: str | None = None
    """Of several teachers, the one that `from_teacher` means."""
    deepspeed: str | dict[str, Any] = "zero2"
    architecture: Literal["enct5", "t5_encoder"] | None = None
    """What a T5 or mT5 checkpoint is read as; None: enct5."""
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(config=STRICT, frozen=True, kw_only=True)
class EvalConfig:
    """When and how the validation split is scored."""

    eval_steps: Count | None = None
    per_device_eval_batch_size: Count | None = None
    """How many rows a rank scores at a time, which changes no result; None: the
    `per_device_train_batch_size` of the stage, and that of `train` outside the stages."""
    metric: str | None = None
    """The metric that chooses the best evaluation and stands in the report; None: the task's."""
    metrics: tuple[str, ...] = ()
    """Further metrics to compute at every evaluation."""
    positive_label: str | None = None
    """The label that f1, precision and recall are about; None: of two labels the second."""
    keep_best: bool | None = None
    """Export the best evaluation instead of the last step; None: yes when eval_steps is set."""


def _repository(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        raise ValueError(f"a repository of the Hub is user/name; got {text!r}")
    return text


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SaveConfig:
    """When checkpoints are written and how many are kept."""

    save_steps: Count = 500
    save_total_limit: Count | None = 2
    push_to_hub: Annotated[str, AfterValidator(_repository)] | None = None
    """Upload final/ to this repository of the Hugging Face Hub, such as user/name."""
    hub_private: bool = False
    """Create that repository private."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LogConfig:
    """What is reported while training."""

    logging_steps: Count = 10
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where the numbers go besides metrics.jsonl."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RunConfig:
    """One run, from the teacher to the exported student."""

    output_dir: Path
    task: TaskConfig
    student: StudentConfig
    method: MethodConfig
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """NumPy's generators take 32 bits."""
    teacher: TeacherConfig | None = None
    teachers: tuple[PooledTeacher, ...] = ()
    """A pool of them, in place of `teacher`."""
    objective: Annotated[tuple[TermConfig, ...], Field(min_length=1)] | None = None
    baselines: tuple[str, ...] = ()
    """Other ways to a model of the student's shape: alone, and those of the method."""
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()
    alone: TrainOverrides | None = None
    """How the baseline of that name is trained where it is not as `train` says."""

    @property
    def teacher_specs(self) -> dict[str, TeacherConfig]:
        """All teachers by name; a single one is called `teacher`."""
        single = {} if self.teacher is None else {TEACHER: self.teacher}
        return {**single, **{spec.name: spec for spec in self.teachers}}

    @property
    def start_role(self) -> str:
        """Whose model the student begins as: its own, or the teacher that `from_teacher` means."""
        if self.student.model != FROM_TEACHER:
            return STUDENT
        return self.student.teacher or TEACHER

    def eval_rows(self, train: TrainConfig | None = None) -> int:
        """Return how many rows a rank scores at a time.

        Args:
            train: of the stage that is evaluated; None: outside the stages.
        """
        rows = self.eval.per_device_eval_batch_size
        return rows or (train or self.train).per_device_train_batch_size

    def key_of(self, role: str) -> str:
        """Where a model stands in the config: `student`, `teacher` or `teachers[2]`.

        Args:
            role: `student`, or a teacher's name.
        """
        names = [spec.name for spec in self.teachers]
        return f"teachers[{names.index(role)}]" if role in names else role


def inherit(train: TrainConfig, overrides: TrainOverrides) -> TrainConfig:
    """The keys that `teacher.finetune` or `alone` set, and `train`'s for the rest.

    `max_steps` and `num_train_epochs` displace each other, and so do `warmup_steps` and
    `warmup_ratio`: whoever is set there decides alone. Another schedule has its own options.
    """
    given = {k: v for k, v in asdict(overrides).items() if v is not None and k != "deepspeed"}
    if "num_train_epochs" in given and "max_steps" not in given:
        given["max_steps"] = None
    if "warmup_ratio" in given and "warmup_steps" not in given:
        given["warmup_steps"] = 0
    if "lr_scheduler_type" in given and "lr_scheduler_kwargs" not in given:
        given["lr_scheduler_kwargs"] = None
    return dataclasses.replace(train, **given)
