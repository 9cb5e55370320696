"""Learning rate schedules as functions of the step, without state to checkpoint or replay.

Each schedule is a dataclass with the options that `train.lr_scheduler_kwargs` may set. Shapes,
names and defaults are the same as in `transformers.get_scheduler`, whose rates differ in the last
bit, and which would load torch to check a config.
"""

from __future__ import annotations

import math
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

    def rate(self, step: int, warm: int, total: int, peak: float) -> float:
        """Return the rate after `step` optimizer steps, of which `warm` are warm-up."""
        if step < warm:
            return peak * step / warm
        return peak * self._decay(step, warm, total, peak)

    def _decay(self, step: int, warm: int, total: int, peak: float) -> float:
        return 1.0

    def problem(self, warm: int, total: int | None, peak: float) -> str | None:
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

    def _decay(self, step: int, warm: int, total: int, peak: float) -> float:
        return max(0.0, 1.0 - _progress(step, warm, total))


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Cosine(ConstantWithWarmup):
    """Linear warm-up, then `num_cycles` periods of a cosine; half a period ends at 0."""

    num_cycles: Positive = 0.5

    def _decay(self, step: int, warm: int, total: int, peak: float) -> float:
        return max(0.0, _cosine(self.num_cycles, _progress(step, warm, total)))


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CosineWithRestarts(ConstantWithWarmup):
    """Linear warm-up, then `num_cycles` half periods of a cosine, each from the peak rate to 0."""

    num_cycles: Count = 1

    def _decay(self, step: int, warm: int, total: int, peak: float) -> float:
        progress = _progress(step, warm, total)
        return 0.0 if progress >= 1 else max(0.0, _cosine(0.5, self.num_cycles * progress % 1.0))


@dataclass(config=STRICT, frozen=True, kw_only=True)
class Polynomial(ConstantWithWarmup):
    """Linear warm-up, then a polynomial decay of degree `power` to the rate `lr_end`."""

    lr_end: Weight = 1e-7
    power: Positive = 1.0

    def _decay(self, step: int, warm: int, total: int, peak: float) -> float:
        remaining = 1 - _progress(step, warm, total)
        return ((peak - self.lr_end) * remaining**self.power + self.lr_end) / peak

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

    def _decay(self, step: int, warm: int, total: int, peak: float) -> float:
        timescale = self.timescale or warm or 10_000
        return 1.0 / math.sqrt((step + timescale - warm) / timescale)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class CosineWithMinLr(ConstantWithWarmup):
    """Linear warm-up, then a cosine down to `min_lr`, or to `min_lr_rate` of the peak rate."""

    num_cycles: Positive = 0.5
    min_lr: Weight | None = None
    min_lr_rate: Fraction | None = None

    def _decay(self, step: int, warm: int, total: int, peak: float) -> float:
        lowest = self.min_lr / peak if self.min_lr is not None else self.min_lr_rate or 0.0
        return _above(lowest, _cosine(self.num_cycles, _progress(step, warm, total)))

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

    def rate(self, step: int, warm: int, total: int, peak: float) -> float:
        if step >= warm:
            return super().rate(step, warm, total, peak)
        progress = step / warm
        rising = {
            "linear": progress,
            "cosine": 0.5 * (1 - math.cos(math.pi * progress)),
            "1-sqrt": 1 - math.sqrt(1 - progress),
        }
        return peak * _above(self.min_lr_ratio, rising[self.warmup_type])

    def _decay(self, step: int, warm: int, total: int, peak: float) -> float:
        stable = self.num_stable_steps
        stable = total - warm - self.num_decay_steps if stable is None else stable
        progress = (step - warm - stable) / self.num_decay_steps
        if not 0 <= progress < 1:
            return 1.0 if progress < 0 else self.min_lr_ratio
        falling = {
            "linear": 1 - progress,
            "cosine": _cosine(self.num_cycles, progress),
            "1-sqrt": 1 - math.sqrt(progress),
        }
        return _above(self.min_lr_ratio, falling[self.decay_type])

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


def _progress(step: int, warm: int, total: int) -> float:
    # 0 at the end of the warm-up, 1 at the end of the stage.
    return min(1.0, (step - warm) / max(1, total - warm))


def _cosine(cycles: float, progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * cycles * 2 * progress))


def _above(lowest: float, share: float) -> float:
    return max(0.0, share * (1 - lowest) + lowest)
