"""The run config: typed, strict, and without torch, so that `--print-config` is fast."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, ValidationInfo
from pydantic.dataclasses import dataclass

from megakd.config.options import METHODS, MethodOptions
from megakd.config.paths import Folder
from megakd.config.sections import (
    FinetuneOverrides,
    GenerationConfig,
    KeptLayers,
    LoraConfig,
    PooledTeacher,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    TrainOverrides,
    decoder_defaults,
    inherit,
)
from megakd.config.task import (
    FROM_TEACHER,
    STUDENT,
    STUDENT_BASE,
    TEACHER,
    UNTRAINED,
    Dtype,
    TaskConfig,
)
from megakd.config.terms import EACH_ONCE, STRICT, Count, Positive, TermConfig, as_tuple, matching


@dataclass(config=STRICT, frozen=True, kw_only=True)
class EvalConfig:
    """Settings of the evaluations on the validation split."""

    eval_steps: Count | None = None
    per_device_eval_batch_size: Count | None = None
    """Rows per rank and forward; results do not depend on this number. None:
    `per_device_train_batch_size` of the stage, or of `train` outside the stages; at most the rows
    that fit into `tokens_per_rank`."""
    metric: str | None = None
    """Metric that chooses the best evaluation and is reported; None: the task's main metric."""
    metrics: tuple[str, ...] = ()
    """Further metrics to compute at every evaluation."""
    keep_best: bool | None = None
    """Export the weights of the best evaluation instead of the last step; None: true if eval_steps
    is set."""
    threshold: Literal["one", "each"] = "one"
    """Whether one probability, the best for micro F1 on the validation rows, decides on all labels
    of a row with any number of them, or each label has its own, the best for its F1."""
    losses: bool = False
    """Also report the losses of the objective on the validation rows, without dropout."""
    generation: GenerationConfig | None = None
    """Also continue held-out prompts and score the texts."""
    latency: bool = True
    """Whether all models are timed at the end of the run, at 1 and 32 texts (a decoder: 1), on a
    CPU also as ONNX graphs (classifiers)."""


Repository = Annotated[
    str,
    matching(
        r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", "must be a Hub repository of the form user/name"
    ),
]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SaveConfig:
    """Settings of checkpoints, of the upload to the Hub, and of the student's graph."""

    save_steps: Count | None = None
    """Steps between checkpoints."""
    save_minutes: Positive | None = None
    """Minutes between checkpoints; null: 5 without save_steps, else steps alone count."""
    save_total_limit: Count | None = 2
    """Checkpoints to keep of a running stage; None: all, also of a finished one."""
    keep: bool = False
    """Keep the newest checkpoint of the finished student and baselines, from which a longer run
    continues; it takes three to four times the space of the model."""
    asynchronous: Literal["auto"] | bool = "auto"
    """Write a copy of the state beside the next steps instead of between two steps; auto: if the
    free memory of every node holds the copy twice."""
    push_to_hub: Repository | None = None
    """Upload final/ to this repository of the Hugging Face Hub, such as user/name."""
    hub_private: bool = False
    """Create the repository as a private repository."""
    dtype: Literal["auto"] | Dtype = "auto"
    """The dtype of the weights in final/; auto: that in which the teacher is stored."""
    onnx: bool = False
    """Also write the student as a graph, final/model.onnx."""

    @property
    def seconds(self) -> float:
        """The time after which a checkpoint is due, infinite if steps alone count."""
        unset = math.inf if self.save_steps else 5.0
        return 60 * (self.save_minutes or unset)


Service = Literal[
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "swanlab",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
]


def _trackers(value: object) -> object:
    names = as_tuple(value)
    return () if names in (None, ("none",), ("None",)) else names  # none, as in transformers


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LogConfig:
    """Settings of the log during training."""

    logging_steps: Count = 10
    report_to: Annotated[tuple[Service, ...], BeforeValidator(_trackers)] = ("tensorboard",)
    """Trackers that get the logged values in addition to metrics.jsonl; none with `none`."""


NO_KEYS = ()
"""`train` of a config without this section."""


def _with_defaults(train: object, info: ValidationInfo) -> object:
    if train == NO_KEYS:  # an instance, since a config may be built without JSON
        return TrainConfig(**_defaults(info))
    # A section that was checked before has all its keys.
    return {**_defaults(info), **train} if isinstance(train, dict) else train


def _defaults(info: ValidationInfo) -> dict[str, Any]:
    task, student = info.data.get("task"), info.data.get("student")
    teachers = [info.data.get("teacher"), *info.data.get("teachers", ())]
    teachers = [teacher for teacher in teachers if teacher is not None]
    if not (task and student and teachers) or task.type != "causal_lm":
        return {}
    tuned = [teacher.finetune for teacher in teachers if teacher.finetune is not None]
    # A teacher that inherits the rate trains all its weights.
    inherits = any(one.learning_rate is None for one in tuned)
    return decoder_defaults(adapters=student.lora is not None and not inherits)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RunConfig:
    """One run, from the teacher to the exported student."""

    output_dir: Folder
    task: TaskConfig
    student: StudentConfig
    method: Annotated[MethodOptions, METHODS]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """At most 32 bits, the limit of NumPy's generators."""
    teacher: TeacherConfig | None = None
    teachers: tuple[PooledTeacher, ...] = ()
    """Several teachers, in place of `teacher`."""
    objective: Annotated[tuple[TermConfig, ...], Field(min_length=1)] | None = None
    baselines: Annotated[tuple[str, ...], EACH_ONCE] | None = None
    """For comparison: `tfidf`, the words of a classifier's texts alone (by default, if the task has
    classes), and models of the student's shape to train: `alone`, and the baselines of the
    method."""
    rollout: RolloutConfig | None = None
    """Train the student on texts that it generates."""
    train: Annotated[TrainConfig, BeforeValidator(_with_defaults), Field(validate_default=True)] = (
        cast("TrainConfig", NO_KEYS)
    )
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
    def trained_baselines(self) -> tuple[str, ...]:
        """The baselines that are trained as models of the student's shape."""
        return tuple(name for name in self.baselines or () if name not in UNTRAINED)

    @property
    def untrained_baselines(self) -> tuple[str, ...]:
        """The baselines of a classifier that the report has beside models."""
        if self.baselines is None:
            return UNTRAINED if self.task.type == "classification" else ()
        return tuple(name for name in self.baselines if name in UNTRAINED)

    @property
    def loaded_models(self) -> dict[str, TeacherConfig | StudentConfig]:
        """Sections of the models that come from a folder, the Hub or a config, by role."""
        loaded: dict[str, TeacherConfig | StudentConfig] = {
            name: spec for name, spec in self.teacher_specs.items() if spec.model != STUDENT_BASE
        }
        return loaded if self.student.model == FROM_TEACHER else {**loaded, STUDENT: self.student}

    @property
    def start_role(self) -> str:
        """Role whose model the student starts from: `student`, or a teacher for `from_teacher`."""
        if self.student.model != FROM_TEACHER:
            return STUDENT
        return self.student.teacher or TEACHER

    @property
    def ranks_layers(self) -> bool:
        """True if the student keeps the most important layers of the teacher that it starts as."""
        kept = self.student.layers
        if self.start_role == STUDENT or kept is None or isinstance(kept, tuple):
            return False
        if isinstance(kept, KeptLayers) and kept.by is not None:
            return kept.by == "importance"
        return self.teacher_specs[self.start_role].reads_model

    @property
    def overrides(self) -> dict[str, TrainOverrides]:
        """The sections that inherit the keys of `train`, by key."""
        specs = self.teacher_specs.items()
        sections = {f"{self.key_of(name)}.finetune": spec.finetune for name, spec in specs}
        every = {**sections, "alone": self.alone}
        return {key: section for key, section in every.items() if section is not None}

    @property
    def ds_configs(self) -> dict[str, str | dict[str, Any]]:
        """The DeepSpeed configs of all models by key."""
        sections = {"student": self.student, **self.overrides}
        sections |= {self.key_of(name): spec for name, spec in self.teacher_specs.items()}
        return {
            f"{key}.deepspeed": section.deepspeed
            for key, section in sections.items()
            if not isinstance(section, TrainOverrides) or isinstance(section, FinetuneOverrides)
        }

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """Settings of every training of the run by key, with inherited values."""
        inherited = {key: inherit(self.train, given) for key, given in self.overrides.items()}
        return {"train": self.train, **inherited}

    @property
    def served_model(self) -> str | None:
        """Name of the model that the servers of `rollout.server` serve; None if it has no name."""
        rollouts = self.rollout
        if rollouts is None or rollouts.server is None:
            return None
        is_student = rollouts.by in (STUDENT, *self.base_teachers)
        spec = self.student if is_student else self.teacher_specs.get(rollouts.by)
        if rollouts.server.model is not None or spec is None:
            return rollouts.server.model
        return spec.model if isinstance(spec.model, str) and spec.model != FROM_TEACHER else None

    @property
    def base_teachers(self) -> tuple[str, ...]:
        """Names of the teachers that are the student without its adapters."""
        specs = self.teacher_specs.items()
        return tuple(name for name, spec in specs if spec.model == STUDENT_BASE)

    def lora_of(self, role: str) -> LoraConfig | None:
        """Return the adapters that the model of a role trains; None: it trains all weights."""
        return self.student.lora if role == STUDENT else None

    def eval_rows(self, train: TrainConfig | None = None) -> int:
        """Return the number of rows that a rank scores at a time."""
        rows = self.eval.per_device_eval_batch_size
        return rows or (train or self.train).rows_at_once(self.task.row_length)

    def key_of(self, role: str) -> str:
        """Return the config key of a model: `student`, `teacher` or, for example, `teachers[2]`."""
        names = [spec.name for spec in self.teachers]
        return f"teachers[{names.index(role)}]" if role in names else role
