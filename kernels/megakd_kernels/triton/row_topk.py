"""Distillation from a cached teacher's k best ids, for whole rows of logits, in one launch.

This is the Triton implementation of `row_topk.TopKRows`. A program loads the logits of the
ids K of its row and replaces them with -inf. It streams the other logits once for their maximum
and sum, and once more to write their gradient. Then it writes the gradient of the ids in K. It
reads the row twice (once without a gradient) and writes it once.
Shapes: R rows, V ids, k ids kept.
"""

# No `from __future__ import annotations`: Triton reads the tl.constexpr annotations as objects.
# Triton's type annotations describe Python calls, not compiled kernels.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megakd_kernels.row_plan import RowInputs, RowTerms
from megakd_kernels.row_topk import TopK, TopKPlan
from megakd_kernels.triton.launching import bias_or
from megakd_kernels.triton.row_kd_sweeps import LANE, base_of, by_lane, write_zeros
from megakd_kernels.triton.row_math import LOG2_E, MINUS_INFINITY

_LARGEST_BLOCK = 4096
_SMALLEST_BLOCK = 128
_IDS_PER_WARP = 512
# Whether a logit is read again.
_AGAIN = tl.constexpr("")
_ONCE = tl.constexpr("evict_first")


@triton.jit
def _logits(row, bias, ids, known, other, BIASED: tl.constexpr, POLICY: tl.constexpr):
    logits = tl.load(row + ids, mask=known, other=other, eviction_policy=POLICY).to(tl.float32)
    if BIASED:
        logits += tl.load(bias + ids, mask=known, other=0.0)
    return logits


@triton.jit
def _sums_of_others(
    row, bias, width, bits,
    HARD: tl.constexpr, TEMPERED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the maximum of the ids not in K, and fp64 sums at the temperature and at 1."""
    peaks = tl.full([BLOCK // LANE], MINUS_INFINITY, tl.float32)
    totals = tl.zeros([BLOCK // LANE], tl.float64)
    hard_totals = tl.zeros([BLOCK // LANE], tl.float64)
    # Per lane, so that no step waits for another thread.
    for start in range(0, width, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        s = by_lane(_logits(row, bias, ids, ids < width, MINUS_INFINITY, BIASED, _AGAIN))
        new_peaks = tl.maximum(peaks, tl.max(s, 1))
        # Without a finite logit the sums are 0, not NaN.
        base = base_of(new_peaks)
        decay = tl.exp2((peaks - base) * bits).to(tl.float64)
        totals = totals * decay + tl.sum(tl.exp2((s - base[:, None]) * bits), 1).to(tl.float64)
        if HARD and TEMPERED:
            decay = tl.exp2((peaks - base) * LOG2_E).to(tl.float64)
            added = tl.sum(tl.exp2((s - base[:, None]) * LOG2_E), 1).to(tl.float64)
            hard_totals = hard_totals * decay + added
        peaks = new_peaks
    peak = tl.max(peaks, 0)
    below = peaks - base_of(peak)
    total = tl.sum(totals * tl.exp2(below * bits).to(tl.float64), 0)
    hard_total = tl.sum(hard_totals * tl.exp2(below * LOG2_E).to(tl.float64), 0)
    return peak, total, hard_total


@triton.jit
def _slope(s, base, bits, slope, hard_slope, HARD: tl.constexpr, TEMPERED: tl.constexpr):
    """Return the gradient of ids not in K, without the label's part; 0 for the logit -inf."""
    gradient = slope * tl.exp2((s - base) * bits)
    if HARD and TEMPERED:
        gradient += hard_slope * tl.exp2((s - base) * LOG2_E)
    return gradient


@triton.jit
def _topk_kernel(
    student, bias, gradient, ids, log_p, rest, best, valid, labels, kd_factor, ce_factor,
    divergence, ce_values, agrees,
    width, count, stride_s, stride_g, bits, inverse, value_scale,
    HARD: tl.constexpr, TEMPERED: tl.constexpr, BIASED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Process one row. bits: log2(e) / T. inverse: 1 / T. count: k."""
    row = tl.program_id(0).to(tl.int64)  # the product with a stride may exceed int32
    student += row * stride_s
    gradient += row * stride_g
    if tl.load(valid + row) == 0:
        if GRADIENT:
            write_zeros(gradient, width, BLOCK)
        return
    lanes = tl.arange(0, KEPT)
    chosen = tl.load(ids + row * count + lanes, mask=lanes < count, other=-1)
    is_kept = chosen >= 0
    kept_logits = _logits(student, bias, chosen, is_kept, MINUS_INFINITY, BIASED, _AGAIN)
    top = tl.load(best + row)
    top_logit = _logits(student, bias, top, top >= 0, MINUS_INFINITY, BIASED, _AGAIN)
    label = tl.full((), -1, tl.int64)
    target = tl.full((), 0.0, tl.float32)
    if HARD:
        label = tl.load(labels + row)
        target = _logits(student, bias, label, label >= 0, 0.0, BIASED, _AGAIN)
    # All lanes read the row before a lane changes it, and change it before a lane reads it again.
    tl.debug_barrier()
    tl.store(student + chosen, tl.full([KEPT], MINUS_INFINITY, student.dtype.element_ty), is_kept)
    tl.debug_barrier()

    highest, others, hard_others = _sums_of_others(
        student, bias, width, bits, HARD, TEMPERED, BIASED, BLOCK
    )
    base = tl.where(highest == MINUS_INFINITY, 0.0, highest)
    peak = tl.maximum(highest, tl.max(kept_logits, 0))
    drop = tl.where(highest == MINUS_INFINITY, 0.0, highest.to(tl.float64) - peak)
    below = kept_logits.to(tl.float64) - peak
    total = tl.sum(tl.exp2(below * bits), 0) + others * tl.exp2(drop * bits)
    log_total = tl.log(total)
    wanted = tl.load(log_p + row * count + lanes, mask=lanes < count, other=MINUS_INFINITY)
    p = tl.exp(wanted.to(tl.float64))
    log_q = below * inverse - log_total
    # Ids with p = 0 are left out, so that -inf - (-inf) is not computed.
    value = tl.sum(p * (tl.where(p > 0, wanted, 0.0) - tl.where(p > 0, log_q, 0.0)), 0)
    left = tl.load(rest + row).to(tl.float64)
    if left > 0:
        log_rest = tl.log(others) + drop * inverse - log_total
        value += left * (tl.log(left) - log_rest)
    tl.store(divergence + row, (value * value_scale).to(tl.float32))
    chance = ((top >= 0) & (top_logit == peak)).to(tl.float32)
    if (chance > 0) & (total >= 2):
        ties = tl.sum((kept_logits == peak).to(tl.float32), 0)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _logits(student, bias, columns, columns < width, MINUS_INFINITY, BIASED, _AGAIN)
            ties += tl.sum((s == peak).to(tl.float32), 0)
        chance = 1.0 / ties
    tl.store(agrees + row, chance)

    ce = 0.0
    hard_total = total
    if HARD:
        ce = tl.load(ce_factor + row)
        if TEMPERED:
            hard_total = tl.sum(tl.exp2(below * LOG2_E), 0) + hard_others * tl.exp2(drop * LOG2_E)
        loss = tl.log(hard_total) - (target.to(tl.float64) - peak)
        tl.store(ce_values + row, loss.to(tl.float32))

    if GRADIENT:
        factor = tl.load(kd_factor + row).to(tl.float64)
        pull = factor
        if HARD and not TEMPERED:
            pull += ce
        # The q of an id that is not in K is its exponential times this share.
        share = tl.exp2(drop * bits) / total
        slope = pull * share - factor * left / tl.where(others > 0, others, 1.0)
        slope = slope.to(tl.float32)
        hard_slope = (ce * tl.exp2(drop * LOG2_E) / hard_total).to(tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            s = _logits(student, bias, columns, columns < width, MINUS_INFINITY, BIASED, _ONCE)
            change = _slope(s, base, bits, slope, hard_slope, HARD, TEMPERED)
            tl.store(gradient + columns, change.to(gradient.dtype.element_ty), mask=columns < width)
        own_change = pull * tl.exp(log_q) - factor * p
        if HARD:
            if TEMPERED:
                own_change += ce * tl.exp2(below * LOG2_E) / hard_total
            own_change -= tl.where(chosen == label, ce, 0.0)
        # Another lane has written 0 to the positions written now.
        tl.debug_barrier()
        own_change = own_change.to(tl.float32).to(gradient.dtype.element_ty)
        tl.store(gradient + chosen, own_change, mask=is_kept)
        if HARD:
            is_outside = tl.max((chosen == label).to(tl.int32), 0) == 0
            change = _slope(target, base, bits, slope, hard_slope, HARD, TEMPERED) - ce
            tl.store(gradient + label, change.to(gradient.dtype.element_ty), mask=is_outside)


@dataclass(frozen=True, kw_only=True)
class TritonTopKRows:
    """Row kernel that runs a plan on blocks of rows.

    bias: [V], added to the logits as they are read.
    block: number of ids that a program reads at a time, a power of two; None: from the width.
    """

    plan: TopKPlan
    bias: Tensor | None = None
    block: int | None = None

    def run_(
        self, student: Tensor, teacher: TopK, inputs: RowInputs, gradient: Tensor | None
    ) -> RowTerms:
        """Run the plan as `row_topk.TopKRows.run_`.

        Logits are fp32, bf16 or fp16, with adjacent columns.
        """
        count, width = student.shape
        plan = self.plan
        labels = inputs.labels if plan.with_ce else None
        # Rows that are not valid stay zero.
        divergence, ce, agrees = student.new_zeros(3, count, dtype=torch.float32).unbind(0)
        form = gradient if plan.with_gradient else None
        block = self.block or _block(width)
        kernel: Any = _topk_kernel
        # A launch uses the current device, which may differ from the device of the tensors.
        with torch.cuda.device_of(student):
            kernel[(count,)](
                student,
                bias_or(self.bias, student),
                student if form is None else form,
                *(tensor.contiguous() for tensor in teacher),
                inputs.valid,
                inputs.valid if labels is None else labels,
                inputs.kd_factor,
                inputs.ce_factor,
                divergence,
                ce,
                agrees,
                width,
                teacher.ids.shape[1],
                student.stride(0),
                0 if form is None else form.stride(0),
                1 / (math.log(2.0) * plan.temperature),
                1 / plan.temperature,
                plan.value_scale,
                HARD=labels is not None,
                TEMPERED=plan.temperature != 1.0,
                BIASED=self.bias is not None,
                GRADIENT=form is not None,
                BLOCK=block,
                KEPT=triton.next_power_of_2(teacher.ids.shape[1]),
                num_warps=max(1, min(8, block // _IDS_PER_WARP)),
            )
        return RowTerms(divergence[None], ce, agrees)


def _block(width: int) -> int:
    return min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, triton.next_power_of_2(width)))
