"""The options of the learning rate schedules of `transformers.get_scheduler`, and their checks.

Each schedule is a dataclass with the options that `train.lr_scheduler_kwargs` may set, with
transformers' defaults. A config is checked without transformers, which gives the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from megakd.contract.terms import STRICT, Count, Fraction, Positive, Weight

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
Shape = Literal["linear", "cosine", "1-sqrt"]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ConstantWithWarmup:
    """Linear warm-up, then the peak rate."""

    def problem(self, warm: int, total: int | None, peak: float) -> str | None:
        """Return why a stage of `total` steps, `warm` of them warm-up, cannot use it, or None."""
        return None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ConstantRate(ConstantWithWarmup):
    """The peak rate at every step."""

    def problem(self, warm: int, total: int | None, peak: float) -> str | None:
        if warm:
            return "this schedule has no warm-up; use constant_with_warmup, or remove the warm-up"
        return None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Linear(ConstantWithWarmup):
    """Linear warm-up, then a straight line to 0."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Cosine(ConstantWithWarmup):
    """Linear warm-up, then `num_cycles` periods of a cosine; half a period ends at 0."""

    num_cycles: Positive = 0.5


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CosineWithRestarts(ConstantWithWarmup):
    """Linear warm-up, then `num_cycles` half periods of a cosine, each from the peak rate to 0."""

    num_cycles: Count = 1


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Polynomial(ConstantWithWarmup):
    """Linear warm-up, then a polynomial decay of degree `power` to the rate `lr_end`."""

    lr_end: Weight = 1e-7
    power: Positive = 1.0

    def problem(self, warm: int, total: int | None, peak: float) -> str | None:
        if self.lr_end >= peak:
            return f"lr_end {self.lr_end:g} must be below learning_rate {peak:g}"
        return None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class InverseSqrt(ConstantWithWarmup):
    """Linear warm-up, then a decay with 1 / sqrt(step).

    timescale: None takes the steps of warm-up, or 10,000 without warm-up.
    """

    timescale: Count | None = None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CosineWithMinLr(ConstantWithWarmup):
    """Linear warm-up, then a cosine down to `min_lr`, or to `min_lr_rate` of the peak rate."""

    num_cycles: Positive = 0.5
    min_lr: Weight | None = None
    min_lr_rate: Fraction | None = None

    def problem(self, warm: int, total: int | None, peak: float) -> str | None:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            return "set exactly one of min_lr and min_lr_rate"
        if self.min_lr is not None and self.min_lr >= peak:
            return f"min_lr {self.min_lr:g} must be below learning_rate {peak:g}"
        return None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class WarmupStableDecay(ConstantWithWarmup):
    """Warm-up, then the peak rate, then a decay over `num_decay_steps`.

    num_stable_steps: steps at the peak rate; None: all steps between warm-up and decay. After the
        decay, the rate stays at `min_lr_ratio` of the peak rate.
    """

    num_decay_steps: Count
    num_stable_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_type: Shape = "linear"
    decay_type: Shape = "cosine"
    min_lr_ratio: Fraction = 0.0
    num_cycles: Positive = 0.5

    def problem(self, warm: int, total: int | None, peak: float) -> str | None:
        stable = self.num_stable_steps or 0
        needed = warm + stable + self.num_decay_steps
        if total is not None and needed > total:
            return (
                f"warm-up {warm}, stable {stable} and decay {self.num_decay_steps} take {needed} "
                f"steps, and the stage has {total}; lower one of the three, or train longer"
            )
        return None


_KINDS = (
    *(Linear, Cosine, ConstantRate, ConstantWithWarmup, Polynomial),
    *(CosineWithRestarts, InverseSqrt, CosineWithMinLr, WarmupStableDecay),
)
SCHEDULES: Mapping[ScheduleName, type[ConstantWithWarmup]] = dict(
    zip(get_args(ScheduleName), _KINDS, strict=True)
)
