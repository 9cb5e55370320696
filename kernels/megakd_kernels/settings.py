"""Arguments of the losses, checked once: what is mixed, which rows count, how sums are reduced.

Shapes: N rows (positions or examples), V vocabulary or classes, H width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("sum", "mean", "num_items", "none")
IMPLEMENTATIONS = ("auto", "chunked", "reference")
LOGITS_DTYPES = ("fp32", "bf16")
ENVIRONMENT_VARIABLE = "MEGAKD_KERNELS"

Divergence = str | Mapping[str, float]
Number = float | Tensor


class KDOutput(NamedTuple):
    """What a distillation loss returns; only `loss` carries a gradient.

    loss: kd_weight * sum_d mixture_d * divergence_sums_d + ce_weight * ce_sum, reduced; nats.
    divergence_sums: [n_div], in the order of the mapping: each divergence, T^2 included when
        `t_squared`, times token_weight, summed over the valid rows. Empty without a teacher.
    ce_sum: token_weight times hard-label cross-entropy, summed; 0 where it was not asked for.
    n_valid: number of rows that count, int64.
    agreement: number of valid rows whose most likely shared id is the same for both models
        (of several equal maxima one in common is enough); without a teacher, where the label
        is a most likely id. int64.
    """

    loss: Tensor
    divergence_sums: Tensor
    ce_sum: Tensor
    n_valid: Tensor
    agreement: Tensor


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The options of a distillation loss, checked on construction (ValueError)."""

    divergence: Divergence
    beta: float
    temperature: float
    t_squared: bool
    kd_weight: Number
    ce_weight: Number
    reduction: str
    num_items: Number | None
    logits_dtype: str = "fp32"
    chunk_mb: float = 1024
    mixture: tuple[tuple[str, float], ...] = field(init=False)

    def __post_init__(self) -> None:
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        if not self.chunk_mb > 0:
            raise ValueError(f"chunk_mb must be above 0, got {self.chunk_mb}")
        _one_of("logits_dtype", self.logits_dtype, LOGITS_DTYPES)
        _check_reduction(self.reduction, self.num_items)
        object.__setattr__(self, "mixture", _mixture(self.divergence, self.beta))

    @property
    def value_scale(self) -> float:
        """What a divergence at this temperature is multiplied by."""
        return self.temperature**2 if self.t_squared else 1.0

    def check_inputs(self, *, has_teacher: bool, has_labels: bool, needs_grad: bool) -> None:
        """Raises ValueError where options and inputs do not fit together."""
        if not has_labels and self.wants_ce:
            raise ValueError(f"ce_weight is {self.ce_weight} but labels is None; pass labels")
        if not has_teacher and not self.wants_ce:
            raise ValueError(
                "without a teacher cross-entropy is the loss, and ce_weight is 0: "
                "pass labels and a ce_weight, or a teacher"
            )
        if self.reduction == "none" and needs_grad:
            raise ValueError(
                "reduction 'none' has no gradient, since gradients are formed in the forward; "
                "call it under torch.no_grad(), or weight the rows with token_weight"
            )

    @property
    def wants_ce(self) -> bool:
        """Only the Python number 0 switches cross-entropy off: a tensor is never read."""
        return isinstance(self.ce_weight, Tensor) or self.ce_weight != 0


class Rows(NamedTuple):
    """Which of the N rows count, and how much.

    valid: [N] bool, rows of the divergences.
    weight: [N] token weight, exactly 0 where not valid.
    labels: [N] int64 with 0 where there is no label, or None.
    hard_weight: [N] like weight, for cross-entropy; None without labels.
    """

    valid: Tensor
    weight: Tensor
    labels: Tensor | None
    hard_weight: Tensor | None


def resolve_implementation(impl: str) -> Literal["chunked", "reference"]:
    """The code path for `impl`; the environment variable MEGAKD_KERNELS overrides "auto".

    Raises:
        ValueError: unknown name, naming the known ones.
    """
    _one_of("impl", impl, IMPLEMENTATIONS)
    if impl == "auto":
        impl = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        _one_of(ENVIRONMENT_VARIABLE, impl, IMPLEMENTATIONS)
    return "reference" if impl == "reference" else "chunked"


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp32, or fp64 as soon as one input is fp64 (gradient checks)."""
    is_double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def as_scalar(value: Number, like: Tensor) -> Tensor:
    """A 0-d tensor of like's dtype and device, without waiting for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, like.dtype).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)


def select_rows(
    count: int,
    *,
    like: Tensor,
    labels: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    valid: Tensor | None = None,
) -> Rows:
    """Flattens and joins the masks; `like` gives dtype and device.

    Raises:
        ValueError: a mask, weight or label tensor does not have one entry per row.
    """
    entries = {"labels": labels, "token_weight": token_weight, "valid": valid}
    for name, tensor in entries.items():
        if tensor is not None and tensor.numel() != count:
            raise ValueError(f"{name} has {tensor.numel()} entries for {count} rows")
    labels = None if labels is None else labels.detach().reshape(-1)
    labelled = None if labels is None else labels != ignore_index
    if valid is not None:
        counted = valid.detach().reshape(-1).bool()
    elif labelled is not None:
        counted = labelled
    else:
        counted = torch.ones(count, dtype=torch.bool, device=like.device)
    given = torch.ones_like(counted, dtype=like.dtype)
    if token_weight is not None:
        given = token_weight.detach().reshape(-1).to(like.dtype)
        counted = counted & (given != 0)
    weight = torch.where(counted, given, 0)
    if labels is None or labelled is None:
        return Rows(counted, weight, None, None)
    hard_weight = torch.where(labelled, weight, 0)
    return Rows(counted, weight, torch.where(labelled & counted, labels, 0), hard_weight)


def shared_vocabulary(student: int, teacher: int, vocab_size: int | None) -> int:
    """The ids [0, n) that both softmaxes run over.

    Raises:
        ValueError: vocab_size is beyond one of the models.
    """
    shared = min(student, teacher)
    if vocab_size is None:
        return shared
    if not 0 < vocab_size <= shared:
        raise ValueError(
            f"vocab_size {vocab_size} must lie in 1..{shared}: "
            f"the student has {student} ids and the teacher {teacher}"
        )
    return vocab_size


def reduction_scale(objective: Objective, n_valid: Tensor, like: Tensor) -> Tensor:
    """The factor from the sum to the loss; dividing by nothing counts as dividing by 1."""
    divisor = torch.ones((), dtype=like.dtype, device=like.device)
    if objective.reduction == "mean":
        divisor = n_valid.to(like.dtype)
    elif objective.reduction == "num_items" and objective.num_items is not None:
        divisor = as_scalar(objective.num_items, like)
    return torch.where(divisor > 0, divisor, 1).reciprocal()


def weighted_total(objective: Objective, divergences: Tensor, ce: Tensor) -> Tensor:
    """kd_weight * mixture . divergences + ce_weight * ce; [n_div, ...] and [...] -> [...]."""
    mixed = torch.zeros_like(ce)
    for (_, weight), value in zip(objective.mixture, divergences.unbind(0), strict=False):
        mixed = mixed + weight * value
    total = as_scalar(objective.kd_weight, ce) * mixed if len(divergences) else mixed
    return total + as_scalar(objective.ce_weight, ce) * ce if objective.wants_ce else total


def _mixture(divergence: Divergence, beta: float) -> tuple[tuple[str, float], ...]:
    weights = {divergence: 1.0} if isinstance(divergence, str) else dict(divergence)
    for name in weights:
        _one_of("divergence", name, DIVERGENCES)
    # GKD's convention: at beta 0 and 1 its formula is 0, and the KL limits are meant.
    limits = {0.0: "forward_kl", 1.0: "reverse_kl"}
    return tuple(
        (limits.get(beta, name) if name == "jsd" else name, float(weight))
        for name, weight in weights.items()
    )


def _check_reduction(reduction: str, num_items: Number | None) -> None:
    _one_of("reduction", reduction, REDUCTIONS)
    if (reduction == "num_items") != (num_items is not None):
        raise ValueError(
            f"reduction {reduction!r} with num_items {num_items}: "
            "num_items is needed by reduction 'num_items' and read by no other"
        )
    if isinstance(num_items, int | float) and num_items <= 0:
        raise ValueError(f"num_items must be above 0, got {num_items}")


def _one_of(argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"unknown {argument} {value!r}; known: {', '.join(known)}")
