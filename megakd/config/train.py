"""The section `train` of a run config, the sections that inherit its keys, and what they mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

from pydantic import Field
from pydantic.dataclasses import dataclass

from megakd.config.paths import Place
from megakd.contract.tasks import FusedLayers, Kernels
from megakd.contract.terms import STRICT, Count, Fraction, Positive, Weight
from megakd.errors import ConfigError, one_line

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
    """Settings of a stage's training, with the names and defaults of Hugging Face's Trainer."""

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
    models, to one kernel each. auto: on a GPU, where a model has them and torch can compile."""
    collective_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds that a rank waits for the other ranks in a collective of tensors. Waits for rank 0,
    which reads, encodes or writes files, have a limit of 24 hours. Only in `train`."""

    def rows_at_once(self, max_length: int) -> int:
        """Return the rows of `max_length` tokens that fit into memory as in a micro-batch."""
        if self.tokens_per_rank is None:
            return self.per_device_train_batch_size
        return max(1, min(self.per_device_train_batch_size, self.tokens_per_rank // max_length))


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
    if name == "constant" and warm:  # transformers would leave out the warm-up
        raise ConfigError(
            f"{where}: this schedule has no warm-up; use constant_with_warmup, or remove the "
            "warm-up"
        )
    try:
        scheduler = get_scheduler(
            name,
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
