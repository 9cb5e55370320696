"""Distillation losses of whole rows of logits: values and gradient in one launch.

This is the Triton implementation of `row_plan.RowKernel`; its sweeps are in `row_kd_sweeps`. The
kernel reads the logits twice for the KL divergences and cross-entropy, and three times for losses
that mix p and q (once less without a gradient). It writes the gradient once.
Shapes: R rows, V ids.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.row_plan import NO_BIASES, Biases, RowInputs, RowPlan, RowTerms
from megakd_kernels.triton.launching import bias_or, check_rows, registers, stages, warp_kind
from megakd_kernels.triton.row_kd_sweeps import (
    ENTROPY,
    FORWARD_KL,
    GRADIENT,
    HARD,
    JSD,
    REVERSE_KL,
    SKEW_KL,
    SKEW_RKL,
    SOFT,
    TEMPERED,
    TVD,
    chance_of_match,
    logit_of,
    means,
    statistics,
    write_gradient,
    write_zeros,
)
from megakd_kernels.triton.row_kd_values import reach_of, store_values
from megakd_kernels.triton.row_math import mixture_series

# Then four programs of 256 threads fit a multiprocessor. A loop takes 3 % more instructions.
_REGISTERS = 64
_KINDS = {
    "forward_kl": FORWARD_KL.value,
    "reverse_kl": REVERSE_KL.value,
    "jsd": JSD.value,
    "skew_kl": SKEW_KL.value,
    "skew_rkl": SKEW_RKL.value,
    "tvd": TVD.value,
    "teacher_entropy": ENTROPY.value,
}
_SLOTS = {name: slot for slot, name in enumerate(_KINDS)}


# The number of rows differs between blocks.
@triton.jit(do_not_specialize=["rows"])
def _row_kernel(
    student, teacher, bias_s, bias_t, gradient, valid, labels, kd_factor, ce_factor, values, agrees,
    rows, width, shared, stride_s, stride_t, stride_g,
    bits, inverse, value_scale, mixes, scale_s, cap_s, scale_t, cap_t,
    weight_forward, weight_reverse, weight_jsd, weight_skew, weight_skew_reverse, weight_tvd,
    PARTS: tl.constexpr, WARP_S: tl.constexpr, WARP_T: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process one row. bits: log2(e) / T. inverse: 1 / T. values: [8, R].

    mixes: `mixture_series` of the shares of p in m, for the JSD, the skew KL and its reverse.
    """
    row = tl.program_id(0).to(tl.int64)  # the product with a stride may exceed int32
    student += row * stride_s
    teacher += row * stride_t
    gradient += row * stride_g
    if tl.load(valid + row) == 0:
        if GRADIENT & PARTS:
            write_zeros(gradient, width, BLOCK)
        return
    logits = (student, teacher)
    warp_s, warp_t = (scale_s, cap_s, bias_s), (scale_t, cap_t, bias_t)
    label = tl.full((), -1, tl.int32)
    target = tl.full((), 0.0, tl.float32)
    ce = 0.0
    if HARD & PARTS:
        label = tl.load(labels + row).to(tl.int32)
        ce = tl.load(ce_factor + row)
        # Read before any part of the row is overwritten.
        target = logit_of(student, label, warp_s, WARP_S)
    summary = statistics(
        logits, shared, width, bits, warp_s, warp_t, PARTS, WARP_S, WARP_T, BLOCK, STAGES
    )
    chance = chance_of_match(
        logits, summary, target, label, shared, width, warp_s, warp_t, PARTS, WARP_S, WARP_T, BLOCK
    )
    tl.store(agrees + row, chance)
    reach = reach_of(summary, inverse)
    mean = means(
        logits, shared, bits, inverse, reach, (summary[3], summary[4]), mixes, warp_s, warp_t,
        PARTS, WARP_S, WARP_T, BLOCK, STAGES,
    )  # fmt: skip
    factor = 0.0
    if SOFT & PARTS:
        factor = tl.load(kd_factor + row)
    weights = (
        weight_forward, weight_reverse, weight_jsd, weight_skew, weight_skew_reverse, weight_tvd
    )  # fmt: skip
    factors, hard_scale = store_values(
        summary, reach, mean, target, values, row, rows, inverse, value_scale, mixes,
        weights, factor, ce, PARTS,
    )  # fmt: skip
    if GRADIENT & PARTS:
        write_gradient(
            gradient, logits, shared, width, bits, inverse, reach, factors, mixes,
            (summary[2], hard_scale, label, ce), warp_s, warp_t,
            PARTS, WARP_S, WARP_T, BLOCK, STAGES,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TritonRows:
    """Row kernel that runs a plan on blocks of rows.

    biases: added to the logits as they are read.
    block: number of ids that a program reads at a time, a power of two; None: from a table.
    """

    plan: RowPlan
    biases: Biases = NO_BIASES
    block: int | None = None

    def run_(
        self, student: Tensor, teacher: Tensor | None, inputs: RowInputs, gradient: Tensor | None
    ) -> RowTerms:
        """Run the plan as `RowKernel.run_`; keep the logits if `gradient` is another tensor.

        Logits are fp32, bf16 or fp16. Rows that are not valid may hold anything.

        Raises:
            ValueError: another dtype, columns that are not adjacent, or nothing to compute.
        """
        if teacher is None and inputs.labels is None:
            raise ValueError("rows without a teacher need labels")
        check_rows(student=student, teacher=teacher, gradient=gradient)
        launch = self._launch(student, teacher, inputs, gradient)
        if len(student):
            # A mixture of divergences would spill.
            is_single = sum(weight != 0 for _, weight in self.plan.mixture) <= 1
            most = registers(_REGISTERS) if is_single else None
            kernel: Any = _row_kernel
            with torch.cuda.device_of(student):
                kernel[(len(student),)](**launch, maxnreg=most)
        values = launch["values"]
        names = [name for name, _ in self.plan.mixture] if teacher is not None else []
        # Of an operator's results, none may share memory with another.
        divergences = values.new_empty(0, len(student))
        if names:
            divergences = torch.stack([values[_SLOTS[name]] for name in names])
        return RowTerms(divergences, values[-1], launch["agrees"])

    def _launch(
        self, student: Tensor, teacher: Tensor | None, inputs: RowInputs, gradient: Tensor | None
    ) -> dict[str, Any]:
        """Return the arguments of the kernel."""
        plan = self.plan
        count, width = student.shape
        labels = inputs.labels if plan.with_ce or teacher is None else None
        form = gradient if plan.with_gradient else None
        weights = dict.fromkeys(_KINDS, 0.0)
        for name, weight in plan.mixture:
            # A name may occur twice, because the limit of one divergence is another divergence.
            weights[name] += weight
        block, warps = _table(width)
        return {
            "student": student,
            "teacher": student if teacher is None else teacher,
            "bias_s": bias_or(self.biases.student, student),
            "bias_t": bias_or(self.biases.teacher, student),
            "gradient": student if form is None else form,
            "valid": inputs.valid,
            "labels": inputs.valid if labels is None else labels,
            "kd_factor": inputs.kd_factor, "ce_factor": inputs.ce_factor,
            # Rows that are not valid stay zero.
            "values": student.new_zeros(len(_KINDS) + 1, count, dtype=torch.float32),
            "agrees": student.new_zeros(count, dtype=torch.float32),
            "rows": count, "width": width, "shared": plan.shared,
            "stride_s": student.stride(0),
            "stride_t": 0 if teacher is None else teacher.stride(0),
            "stride_g": 0 if form is None else form.stride(0),
            "bits": 1 / (math.log(2.0) * plan.temperature), "inverse": 1 / plan.temperature,
            "value_scale": plan.value_scale,
            "mixes": tuple(
                mixture_series(share) for share in (plan.beta, plan.skew, 1 - plan.skew)
            ),
            "scale_s": plan.student_warp.scale, "cap_s": plan.student_warp.softcap,
            "scale_t": plan.teacher_warp.scale, "cap_t": plan.teacher_warp.softcap,
            "weight_forward": weights["forward_kl"], "weight_reverse": weights["reverse_kl"],
            "weight_jsd": weights["jsd"], "weight_skew": weights["skew_kl"],
            "weight_skew_reverse": weights["skew_rkl"], "weight_tvd": weights["tvd"],
            "PARTS": self._parts(teacher, labels, form),
            "WARP_S": warp_kind(plan.student_warp, self.biases.student),
            "WARP_T": warp_kind(plan.teacher_warp, self.biases.teacher),
            "BLOCK": self.block or block, "STAGES": stages(), "num_warps": warps,
        }  # fmt: skip

    def _parts(self, teacher: Tensor | None, labels: Tensor | None, form: Tensor | None) -> int:
        """Return the parts that the kernel is compiled for, as bits."""
        parts = 0 if labels is None else HARD.value
        if teacher is not None:
            parts |= SOFT.value
            for name, _ in self.plan.mixture:
                parts |= _KINDS[name]
            if self.plan.temperature != 1.0:
                parts |= TEMPERED.value
        return parts if form is None else parts | GRADIENT.value


def _table(width: int) -> tuple[int, int]:
    """Return ids per step and warps of a program, with eight logits of each model per thread.

    According to ptxas for sm_90, the registers then suffice per multiprocessor for four programs
    of a KL divergence or three programs of a mixing loss. No step waits for another thread.
    """
    block = min(2048, max(128, triton.next_power_of_2(width)))
    return block, max(1, block // 256)
