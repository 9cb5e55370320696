"""The sections of a run config about models, training and generated texts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from megakd.config.paths import Folder, Name, Place
from megakd.config.task import STUDENT, STUDENT_BASE, Dtype, FusedLayers, Kernels
from megakd.config.terms import (
    EACH_ONCE,
    STRICT,
    Count,
    Fraction,
    Positive,
    Source,
    Weight,
    as_tuple,
    matching,
)
from megakd.errors import ConfigError, one_line

MOST_DRAWS = 255
"""Most draws of a position in a cache, which keeps the count of a token in a byte."""


class Sampling(NamedTuple):
    """Settings with which a model continues a prompt.

    max_new_tokens: maximum number of tokens of a completion, the end token included.
    temperature: divisor of the logits; 0 takes the most likely token.
    top_p: sample from the smallest set of tokens with at least this probability.
    top_k: sample from this many most likely tokens; None: from all tokens.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


Schedule = Callable[[int], float]

ScheduleName = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "cosine_with_restarts",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a stage's training, with the names and defaults of Hugging Face's Trainer.

    Of a decoder that learns from a teacher some defaults are others, see `decoder_defaults`.
    """

    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=2**20)] = 1
    tokens_per_rank: Annotated[int, Field(ge=8, le=2**24)] | None = None
    """Pack the rows of a step into micro-batches of at most this many tokens; a step keeps its
    rows, per_device_train_batch_size * gradient_accumulation_steps * ranks, and its gradient. Only
    for causal_lm. None: micro-batches of per_device_train_batch_size padded rows."""
    packing: Literal["auto"] | bool = "auto"
    """Whether texts of causal_lm share rows; only in `train`. auto: if all models compute a text in
    such a row as they compute it alone. false: a row has one text, padded on the right."""
    num_train_epochs: Annotated[float, Field(gt=0, le=1e9)] = 3.0
    max_steps: Count | None = None
    """In optimizer steps; overrides num_train_epochs."""
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-5
    lr_scheduler_type: ScheduleName = "linear"
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Options of the schedule, named as in Transformers: `{num_decay_steps: 100}`."""
    warmup_ratio: Fraction = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """In optimizer steps; overrides warmup_ratio if above 0."""
    class_weights: Literal["balanced"] | None = None
    """Weigh every label by the inverse of its share of the rows, in the loss on labels; a
    `hard_cross_entropy` of the objective may set weights of its own (classification)."""
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
    activation_offload: bool = False
    """Keep the inputs of checkpointed layers in host memory until the backward, for long rows.
    Needs gradient_checkpointing; has no effect on a CPU."""
    early_stopping_patience: Count | None = None
    """Stop the stage after this many evaluations in a row without a better score."""
    kernels: Kernels = "auto"
    """Implementation of the losses; all give the same result up to rounding. auto is triton on a
    GPU."""
    fused_layers: FusedLayers = "auto"
    """Compile norms, gated MLPs and rotations of the student, and with those of `train` of frozen
    models, to one kernel each. auto: off, because no GPU has run them."""
    collective_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds that a rank waits for the other ranks in a collective of tensors. Waits for rank 0,
    which reads, encodes or writes files, have a limit of 24 hours. Only in `train`."""

    def rows_at_once(self, max_length: int) -> int:
        """Return the rows of `max_length` tokens that fit into memory as in a micro-batch."""
        if self.tokens_per_rank is None:
            return self.per_device_train_batch_size
        return max(1, min(self.per_device_train_batch_size, self.tokens_per_rank // max_length))


def decoder_defaults(*, adapters: bool) -> dict[str, Any]:
    """Return the keys of `train` whose defaults are others where a decoder learns from a teacher.

    adapters: whether adapters learn alone; they take a higher rate than weights.
    """
    return {
        "learning_rate": 2e-4 if adapters else 5e-5,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
    }


if TYPE_CHECKING:

    class TrainOverrides(TrainConfig):
        """Every key of `train` but those of the whole run, or None to inherit the key."""

else:
    _hints = get_type_hints(TrainConfig, include_extras=True)
    _of_run = ("collective_timeout", "packing")
    _optional = {key: hint | None for key, hint in _hints.items() if key not in _of_run}
    _body = {"__module__": __name__, "__annotations__": _optional, **dict.fromkeys(_optional)}
    TrainOverrides = dataclass(config=STRICT, frozen=True, kw_only=True)(
        type("TrainOverrides", (), _body)
    )


@dataclass(config=STRICT, frozen=True, kw_only=True)
class FinetuneOverrides(TrainOverrides):
    """`teacher.finetune`: every key of `train`, and the DeepSpeed config of the fine-tuning."""

    deepspeed: Place | dict[str, Any] = "auto"


def inherit(train: TrainConfig, overrides: TrainOverrides) -> TrainConfig:
    """Return the settings of `train`, replaced by the keys that `overrides` sets.

    An override of `num_train_epochs` resets an inherited `max_steps`, and an override of
    `warmup_ratio` resets inherited `warmup_steps`, which would otherwise win. An override of
    `lr_scheduler_type` resets inherited `lr_scheduler_kwargs`.
    """
    given = {k: v for k, v in asdict(overrides).items() if v is not None and k != "deepspeed"}
    resets = {"num_train_epochs": "max_steps", "warmup_ratio": "warmup_steps"}
    resets["lr_scheduler_type"] = "lr_scheduler_kwargs"
    defaults = {other: getattr(TrainConfig, other) for key, other in resets.items() if key in given}
    return dataclasses.replace(train, **defaults | given)


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a stage; `max_steps` overrides `num_train_epochs`."""
    return train.max_steps or math.ceil(train.num_train_epochs * steps_per_epoch)


def warmup_steps(train: TrainConfig, total_steps: int) -> int:
    """Return the optimizer steps of warm-up; `warmup_steps` overrides `warmup_ratio`."""
    return train.warmup_steps or math.ceil(train.warmup_ratio * total_steps)


def learning_rate_schedule(train: TrainConfig, total_steps: int) -> Schedule:
    """Return the function from the number of steps taken to the learning rate.

    After the last step the rate stays as it is: a cosine would rise again.

    Raises:
        ConfigError: the schedule lacks an option, does not know one, or does not fit in the steps.
    """
    # A config is checked without torch.
    import torch
    from transformers import get_scheduler

    options, peak = train.lr_scheduler_kwargs or {}, train.learning_rate
    name, warm = train.lr_scheduler_type, warmup_steps(train, total_steps)
    where = f"train.lr_scheduler_type: {name}"
    try:
        scheduler = get_scheduler(
            # `constant` would leave out the warm-up.
            "constant_with_warmup" if name == "constant" else name,
            torch.optim.SGD([torch.zeros(1)], lr=peak),
            num_warmup_steps=warm,
            # One of the two sets the steps at the peak rate of `warmup_stable_decay`.
            num_training_steps=total_steps if options.get("num_stable_steps") is None else None,
            scheduler_specific_kwargs=options,
        )
        (factor,) = cast("torch.optim.lr_scheduler.LambdaLR", scheduler).lr_lambdas
        factor(total_steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {one_line(error)}; correct train.lr_scheduler_kwargs ({options})"
        ) from error
    needed = warm + sum(options.get(key) or 0 for key in ("num_stable_steps", "num_decay_steps"))
    if name == "warmup_stable_decay" and needed > total_steps:
        raise ConfigError(
            f"{where}: warm-up, stable and decay take {needed} steps, and the stage has "
            f"{total_steps}; lower one of the three, or train longer"
        )
    return lambda step: peak * factor(min(step, total_steps))


def address(text: str) -> str:
    """Return the address of a server without the version of its API; ValueError if it is none."""
    given = re.fullmatch(r"https?://([^/\s:\[\]]+|\[[\da-fA-F:.]+\])(:\d+)?(/[^\s?#]*)?", text)
    # http.client sends neither a host such as a..b nor letters beyond ASCII.
    is_sent = given is not None and text.isascii() and ".." not in given[1]
    if given is None or not is_sent or int((given[2] or ":0")[1:]) > 65535:
        raise ValueError(f"must be of the form http://host:port (got {text!r})")
    # The base of other clients ends in the version of the API.
    return text.rstrip("/").removesuffix("/v1")


Urls = Annotated[
    tuple[Annotated[str, AfterValidator(address)], ...], Field(min_length=1), EACH_ONCE
]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ServerConfig:
    """Replicas of a vLLM server, in an environment of their own."""

    url: Urls
    """Addresses of the replicas, such as http://node7:8000; all replicas serve one model."""
    model: Name | None = None
    """Name or path of the model as the servers state it; None: that of `rollout.by`, or the
    teacher's `model`, as in the config."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RolloutServerConfig(ServerConfig):
    """Servers that generate texts."""

    push: Literal["full", "adapter", "none"]
    """How the servers get the weights of the student before they generate: `full` writes the whole
    model into `folder`, `adapter` the adapters of `student.lora`; `none` leaves the servers as they
    are."""
    folder: Folder | None = None
    """Folder for the pushed weights, which rank 0 writes and all servers read, such as a folder in
    /dev/shm if the servers run on the node of rank 0."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TeacherServerConfig(ServerConfig):
    """Servers that answer in place of a teacher's own engine.

    They return the largest log-probabilities of the next token at every position.
    """

    top_k: Count = 64
    """Number of tokens per position that the servers return."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of the sampling; the defaults sample from the model as it is."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """0: the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count | None = None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TextsConfig:
    """How prompts are continued, in training and in evaluations."""

    max_new_tokens: Count
    """Maximum number of generated tokens per row."""
    sampling: SamplingConfig = SamplingConfig()
    rows_per_call: Count = 64
    """Rows that a rank continues at the same time."""
    prompt_tokens: Count | None = None
    """For rows without a prompt (plain text): the number of tokens at the beginning of a row that
    are continued."""

    @property
    def how(self) -> Sampling:
        how = self.sampling
        return Sampling(self.max_new_tokens, how.temperature, how.top_p, how.top_k)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RolloutConfig(TextsConfig):
    """Rows of a step are replaced by texts that the student generates from the rows' prompts."""

    mix: Fraction = 1.0
    """Probability of a step to learn from texts, and not from the rows of the data as they are;
    lambda of GKD (Agarwal et al. 2024, algorithm 1)."""
    from_step: Annotated[int, Field(ge=0)] = 0
    """The steps before this step use the data alone."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """How many updates the student may be ahead of the texts: texts are generated for
    `max_staleness` + 1 steps at a time. A server generates for `max_staleness` steps at a time,
    one step ahead, while the student learns."""
    by: str = STUDENT
    """The model that generates: `student`, or the name of a teacher for sequence-level distillation
    (Kim and Rush 2016)."""
    server: RolloutServerConfig | None = None
    """Inference servers that generate the texts in place of the run's own engine."""

    @property
    def draws(self) -> set[Source]:
        """Sources that the steps learn from: generated texts (`rollouts`) and the `data`."""
        data: set[Source] = {"data"} if self.mix < 1 or self.from_step else set()
        return data | ({"rollouts"} if self.mix else set())

    @property
    def works_ahead(self) -> bool:
        """True if a server generates the next texts while the student learns."""
        return self.server is not None and self.max_staleness > 0


def rollout_block(step: int, config: RolloutConfig) -> range:
    """Return the steps whose texts are generated together with the texts of `step`."""
    size = config.max_staleness + (0 if config.works_ahead else 1)
    first = config.from_step + (step - config.from_step) // size * size
    return range(first, first + size)


def _with_a_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error} (got {pattern!r})") from None
    if groups != 1:
        raise ValueError(f"must have one group, the answer, such as '#### (.+)' (got {pattern!r})")
    return pattern


@dataclass(config=STRICT, frozen=True, kw_only=True)
class GenerationConfig(TextsConfig):
    """Held-out prompts that every evaluation continues with the student.

    The evaluation reports the length of the texts, the share that `max_new_tokens` cuts, and the
    share whose answer is that of the row.
    """

    rows: Count = 64
    """Number of validation rows; the first rows are used."""
    match: Literal["exact"] | None = None
    """Compare the answers in the texts with those in the rows' own completions, as text. The metric
    is `match`."""
    answer: Annotated[str, AfterValidator(_with_a_group)] | None = None
    """Regular expression with one group; the last match in a text is its answer. None: the whole
    text is the answer."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)


Attention = Literal["varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
"""`varlen` computes packed rows document by document; the others are those of transformers."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ScratchModel:
    """A model that starts from random weights."""

    config: dict[str, Any]
    """Keys of the model's Hugging Face config."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ModelConfig:
    """How a model is opened."""

    architecture: Literal["enct5", "t5_encoder"] | None = None
    """Architecture to load a T5 or mT5 checkpoint as; None: enct5."""
    trust_remote_code: bool = False
    attn_implementation: Attention | None = None
    """None: on a GPU `varlen` for causal_lm in 16 bits, else the choice of transformers."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TeacherConfig(ModelConfig):
    """The frozen model that the student learns from, with its own DeepSpeed engine."""

    model: Place | ScratchModel
    """A folder, a Hub id, a config, or `student_base`: the student without its adapters
    (`student.lora`), which teaches without a second model in memory."""
    deepspeed: Place | dict[str, Any] = "teacher_zero3"
    """Preset name, path or inline mapping; ZeRO 0 (replicated) or 3 (sharded)."""
    dtype: Dtype | Literal["fp8"] | None = None
    """None: on a CPU fp32; on a GPU the dtype of the checkpoint, and bf16 for fp32. fp8: bf16 with
    the linear layers in 8 bits."""
    finetune: FinetuneOverrides | None = None
    cache: Literal["auto"] | Folder | None = None
    """Folder with the teacher's answers to the training rows, written by launch/cache_teacher.py.
    The student learns from the folder instead of the model. `auto`: the run asks the teacher once
    about every row, and keeps the answers in its own folder."""
    cache_top_k: Count = 64
    """Number of tokens to keep per position; only for language models."""
    cache_draws: Annotated[int, Field(ge=1, le=MOST_DRAWS)] | None = None
    """Number of random draws to keep per position in place of the most likely tokens, such as 16;
    only for causal_lm. The gradient of the soft targets is then unbiased. Draws do not depend on
    `seed`, so that runs can share a cache."""
    server: TeacherServerConfig | None = None
    """Inference servers that answer instead of the model, which is then not loaded; only for
    causal_lm."""
    joins_micro_batches: bool | None = None
    """Whether one forward answers all micro-batches of a step. None: at ZeRO 3, if they fit into
    memory."""

    @property
    def reads_model(self) -> bool:
        """Whether the model itself answers, and not a folder of answers or servers."""
        return self.cache in (None, "auto") and self.server is None

    @property
    def served_model(self) -> str | None:
        """Name of the model that the teacher's servers have to serve; None if it has no name."""
        if not isinstance(self.model, str) or self.model == STUDENT_BASE:
            return None
        return self.model if self.server is None or self.server.model is None else self.server.model


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PooledTeacher(TeacherConfig):
    """One of several teachers."""

    name: Annotated[
        str,
        matching(
            r"[A-Za-z0-9][A-Za-z0-9_-]*",
            "the name of a teacher must consist of letters, digits, - and _, and start with a "
            "letter or digit, such as bert-base",
        ),
    ]
    """Name of the teacher in logs, in the report and in the folders of the run."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters that learn in place of the student's own weights.

    A linear layer W becomes W + alpha / r * B A with a frozen W (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685, section 4.1).
    """

    r: Count = 64
    """Rank of the adapters."""
    alpha: Positive | None = None
    """Factor of the adapters' outputs, divided by `r`; None: 2 r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapters' inputs."""
    target_modules: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1)] | None,
        BeforeValidator(lambda value: None if as_tuple(value) == ("all-linear",) else value),
        BeforeValidator(as_tuple),
    ] = None
    """Names of the adapted linear layers, such as q_proj; None: all of attention and MLP, which
    peft calls all-linear."""

    @property
    def scale(self) -> float:
        """The factor alpha, before the division by `r`."""
        return 2.0 * self.r if self.alpha is None else self.alpha


@dataclass(config=STRICT, frozen=True, kw_only=True)
class KeptLayers:
    """A number of layers to keep, and the rule that chooses them."""

    keep: Count
    """Number of layers to keep."""
    by: Literal["importance", "spacing"] | None = None
    """`importance`: the layers without which the loss of the teacher rises most; `spacing`: the
    first, the last, and evenly spaced layers between. None: by importance if the student starts
    from a teacher that the run loads."""


Layers = Annotated[tuple[Count, ...], Field(min_length=1), EACH_ONCE]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class StudentConfig(ModelConfig):
    """The model that learns."""

    model: Place | ScratchModel
    """A folder, a Hub id, a config, or `from_teacher`. With `from_teacher`, the method cuts the
    student out of the teacher, or the student gets some of the teacher's `layers`."""
    layers: Count | Layers | KeptLayers | None = None
    """Numbers of the layers to keep, counted from 1, or how many layers to keep."""
    teacher: str | None = None
    """Name of the teacher for `from_teacher`, if there are several teachers."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of the model instead of its weights; None: train all weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout in place of every dropout of the model's config, also in its exported config; None:
    as the config has it. 0 makes the targets of distillation easier to match."""
    deepspeed: Place | dict[str, Any] = "auto"
    """`auto`: zero2; zero0 on one rank, but for 16 bits on a GPU or in several backwards."""
