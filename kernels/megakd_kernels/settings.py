"""Options of the losses: mixture of divergences, reduction of sums, and choice of code path.

Shapes: N rows (positions or examples).
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from megakd_kernels.inputs import check_constants
from megakd_kernels.row_plan import Warp

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "tvd")
REDUCTIONS = ("sum", "mean", "num_items", "none")
IMPLEMENTATIONS = ("auto", "triton", "chunked", "reference")
ENVIRONMENT_VARIABLE = "MEGAKD_KERNELS"

HAS_TRITON = importlib.util.find_spec("triton") is not None

# What the row kernels and tiles are compiled for; the tests compile for 8.0, 9.0 and 10.0.
LEAST_CAPABILITY, LEAST_SHARED_KIB = (8, 0), 96

# Devices for which "auto" has been decided.
_FITS: dict[torch.device, bool] = {}

# Numbers on a CPU up to which eager torch is faster than an operator.
SMALL = 1 << 14
_PLAIN = (Tensor, Parameter)

Implementation = Literal["triton", "chunked", "reference"]
Divergence = str | Mapping[str, float]
Number = float | Tensor


class KDOutput(NamedTuple):
    """Result of a distillation loss; only `loss` carries a gradient.

    loss: kd_weight * sum_d mixture_d * divergence_sums_d + ce_weight * ce_sum, reduced; nats.
    divergence_sums: [n_div], in the order of the mapping: each divergence, with T^2 if
        `t_squared`, times token_weight, summed over the valid rows. Empty without a teacher.
    ce_sum: token_weight times hard-label cross-entropy, summed; 0 if not requested.
    n_valid: number of rows that count, int64.
    agreement: number of valid rows whose most likely shared id is the same for both models;
        without a teacher, number of valid rows whose label is the most likely id. Of several
        equal maxima a model chooses one at random: a row counts with the probability of a match.
    row_divergences, row_ce, row_agrees: [n_div, N], [N], [N], the terms of these sums, 0 for a
        row that does not count. They separate groups of rows that one call scores together.
    """

    loss: Tensor
    divergence_sums: Tensor
    ce_sum: Tensor
    n_valid: Tensor
    agreement: Tensor
    row_divergences: Tensor
    row_ce: Tensor
    row_agrees: Tensor

    @classmethod
    def of(
        cls, loss: Tensor, divergences: Tensor, ce: Tensor, agrees: Tensor, n_valid: Tensor
    ) -> KDOutput:
        """Sum the row values; `loss` is already reduced."""
        divergences, ce = divergences.detach(), ce.detach()
        sums = (divergences.sum(1), ce.sum(), n_valid, agrees.sum())
        return cls(loss, *sums, divergences, ce, agrees)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The options of a distillation loss, checked on construction (ValueError).

    mixture: names and weights of the divergences; the limit of a formula has its own name.
    value_scale: factor of the divergences: temperature^2 if `t_squared`, else 1.
    wants_ce: True unless the weight is the Python number 0; tensor values are not read.
    with_entropy: measure the teacher's entropy too, as a last divergence of weight 0.
    """

    divergence: Divergence
    beta: float
    skew: float
    temperature: float
    t_squared: bool
    kd_weight: Number
    ce_weight: Number
    reduction: str
    num_items: Number | None
    chunk_mb: float | None = None
    with_entropy: bool = False
    mixture: tuple[tuple[str, float], ...] = field(init=False)
    value_scale: float = field(init=False)
    wants_ce: bool = field(init=False)

    def __post_init__(self) -> None:
        if not (0 < self.temperature < math.inf):
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must lie in [0, 1], got {self.beta}")
        if not 0 <= self.skew < 1:
            raise ValueError(f"skew must lie in [0, 1), got {self.skew}")
        if self.chunk_mb is not None and not self.chunk_mb > 0:
            raise ValueError(f"chunk_mb must be above 0, got {self.chunk_mb}")
        check_constants(
            kd_weight=self.kd_weight, ce_weight=self.ce_weight, num_items=self.num_items
        )
        _check_reduction(self.reduction, self.num_items)
        scale = self.temperature**2 if self.t_squared else 1.0
        wants_ce = isinstance(self.ce_weight, Tensor) or self.ce_weight != 0
        mixture = _mixture(self.divergence, self.beta, self.skew)
        entropy = (("teacher_entropy", 0.0),) if self.with_entropy else ()
        object.__setattr__(self, "mixture", mixture + entropy)
        object.__setattr__(self, "value_scale", scale)
        object.__setattr__(self, "wants_ce", wants_ce)

    def check_inputs(self, *, has_teacher: bool, has_labels: bool, needs_grad: bool) -> None:
        """Raise ValueError if options and inputs do not fit together."""
        if not has_labels and self.wants_ce:
            raise ValueError(f"ce_weight is {self.ce_weight} but labels is None; pass labels")
        if not has_teacher and not self.wants_ce:
            raise ValueError(
                "without a teacher, cross-entropy is the only loss, and ce_weight is 0; pass "
                "labels and a ce_weight, or a teacher"
            )
        if self.reduction == "none" and needs_grad:
            raise ValueError(
                "reduction 'none' has no gradient, since gradients are formed in the forward; "
                "call it under torch.no_grad(), or weight the rows with token_weight"
            )


def resolve_implementation(impl: str, device: torch.device) -> Implementation:
    """Return the code path for `impl` on this device; MEGAKD_KERNELS overrides "auto".

    "auto" is "triton" on a CUDA device with Triton installed that can run the kernels, else
    "chunked", with one warning if the GPU cannot.

    Raises:
        ValueError: the name is unknown (the message lists the known names), or "triton" cannot
            run on the device.
    """
    one_of("impl", impl, IMPLEMENTATIONS)
    source = "impl"
    if impl == "auto":
        impl = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
        source = ENVIRONMENT_VARIABLE
        one_of(source, impl, IMPLEMENTATIONS)
    if impl == "triton":
        _check_triton(source, device)
        return "triton"
    if impl == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON and _fits(device) else "chunked"
    return "reference" if impl == "reference" else "chunked"


def runs_kernels(implementation: str, dtype: torch.dtype) -> bool:
    """Return whether Triton kernels compute, which know no fp64: only gradient checks use it.

    dtype: the compute dtype.
    """
    return implementation == "triton" and dtype == torch.float32


def formed_dtype(implementation: str, given: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the gradient of an input is formed.

    given: dtype of the input. dtype: the compute dtype. Kernels form the gradient of a bf16 input
    in bf16, which has the exponents of fp32, so that an upstream gradient cannot make it vanish.
    """
    is_narrow = runs_kernels(implementation, dtype) and given == torch.bfloat16
    return given if is_narrow else dtype


def is_small(impl: str, *tensors: Tensor | None) -> bool:
    """Return whether eager torch is faster than an operator, which has 100 steps in Python.

    So it is for at most `SMALL` numbers on a CPU. A caller who names an implementation gets it.
    """
    if impl != "auto" or torch.compiler.is_compiling():
        return False
    count = 0
    for tensor in tensors:
        if tensor is not None:
            if type(tensor) not in _PLAIN or not tensor.is_cpu:
                return False
            count += tensor.numel()
    # Reading the environment takes the longest.
    return count <= SMALL and not os.environ.get(ENVIRONMENT_VARIABLE)


def _check_triton(source: str, device: torch.device) -> None:
    if not HAS_TRITON:
        raise ValueError(f"{source} 'triton': the package triton is not installed; use 'chunked'")
    # Triton's interpreter runs kernels on CPU tensors, for tests.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"{source} 'triton' needs CUDA tensors, got {device.type}; use 'chunked'")
    if device.type == "cuda" and not torch.compiler.is_compiling() and (lack := _lack(device)):
        raise ValueError(f"{source} 'triton': {lack}; use 'chunked'")


def _fits(device: torch.device) -> bool:
    """Return whether a GPU can run the kernels; warn once if it cannot."""
    if torch.compiler.is_compiling():
        return True  # Dynamo cannot read the properties; the first launch of a program tells
    if device not in _FITS:
        lack = _lack(device)
        _FITS[device] = lack is None
        if lack:
            warnings.warn(f"the losses run in plain torch ('chunked'): {lack}", stacklevel=2)
    return _FITS[device]


def _lack(device: torch.device) -> str | None:
    """Return what a GPU has and the kernels need; None if it can run them."""
    if not torch.cuda.is_available():
        return None  # a forward of tensors that only claim to be there
    if torch.version.hip:
        return f"{device} is no GPU of NVIDIA, for which the kernels are written"
    card = torch.cuda.get_device_properties(device)
    shared = card.shared_memory_per_block_optin >> 10
    has = f"{device} ({card.name}) has"
    if (card.major, card.minor) < LEAST_CAPABILITY:
        return f"{has} compute capability {card.major}.{card.minor}; the kernels need {_dotted()}"
    if shared < LEAST_SHARED_KIB:
        return f"{has} {shared} KiB of shared memory; the kernels need {LEAST_SHARED_KIB}"
    return None


def _dotted() -> str:
    return ".".join(map(str, LEAST_CAPABILITY))


def warp(which: str, scale: float, softcap: float | None) -> Warp:
    """Return the scale and cap of one model's logits.

    Raises:
        ValueError: a cap or scale is not above 0 or not finite.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"logit_scale_{which} must be above 0 and finite, got {scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap_{which} must be above 0 and finite or None, got {softcap}")
    return Warp(scale, softcap or 0.0)


def as_scalar(value: Number, like: Tensor) -> Tensor:
    """Return a 0-d tensor of like's dtype and device, without waiting for the device."""
    if isinstance(value, Tensor):
        return value.detach().to(like.device, like.dtype).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)


def reduction_scale(objective: Objective, n_valid: Tensor, like: Tensor) -> Number:
    """Return the factor from the sum to the loss; a divisor of 0 counts as 1."""
    if objective.reduction == "mean":
        return n_valid.clamp(min=1).to(like.dtype).reciprocal()
    if objective.reduction != "num_items" or objective.num_items is None:
        return 1.0
    divisor = as_scalar(objective.num_items, like)
    return torch.where(divisor > 0, divisor, 1).reciprocal()


def weighted_total(objective: Objective, divergences: Tensor, ce: Tensor) -> Tensor:
    """Return kd_weight * mixture . divergences + ce_weight * ce, [n_div, ...], [...] -> [...].

    A term of weight 0 adds 0, even if its value is infinite.
    """
    total = weigh(ce, objective.ce_weight) if objective.wants_ce else torch.zeros_like(ce)
    for (_, weight), value in zip(objective.mixture, divergences.unbind(0), strict=False):
        if weight != 0:
            total = total + weigh(weigh(value, weight), objective.kd_weight)
    return total


def weigh(values: Tensor, weight: Number) -> Tensor:
    """Return values * weight; 0 for weight 0 even if the value is infinite; NaN for weight NaN.

    weight: number, or tensor that broadcasts to the values.
    """
    if isinstance(weight, Tensor):
        weight = weight.detach().to(values.device, values.dtype)
        return torch.where(weight != 0, values * weight, 0)
    if weight == 0:
        return torch.zeros_like(values)
    return values if weight == 1 else values * weight


def _mixture(divergence: Divergence, beta: float, skew: float) -> tuple[tuple[str, float], ...]:
    weights = {divergence: 1.0} if isinstance(divergence, str) else dict(divergence)
    if not weights:
        raise ValueError("divergence is empty; name a divergence, or set kd_weight to 0")
    check_constants(**weights)
    for name, weight in weights.items():
        one_of("divergence", name, DIVERGENCES)
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name} must be finite, got {weight}")
    return tuple([(_limit(name, beta, skew), float(weight)) for name, weight in weights.items()])


def _limit(name: str, beta: float, skew: float) -> str:
    """Return the limit of a degenerate formula; the limits of jsd follow GKD's convention."""
    if name == "jsd":
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), name)
    if skew == 0:
        return {"skew_kl": "forward_kl", "skew_rkl": "reverse_kl"}.get(name, name)
    return name


def _check_reduction(reduction: str, num_items: Number | None) -> None:
    one_of("reduction", reduction, REDUCTIONS)
    if (reduction == "num_items") != (num_items is not None):
        raise ValueError(
            f"reduction {reduction!r} with num_items {num_items}: reduction 'num_items' needs "
            "num_items, and no other reduction uses it"
        )
    if isinstance(num_items, int | float) and num_items <= 0:
        raise ValueError(f"num_items must be above 0, got {num_items}")


def one_of(argument: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError if `value` is unknown; the message lists the known values."""
    if value not in known:
        raise ValueError(f"unknown {argument} {value!r}; known: {', '.join(known)}")
