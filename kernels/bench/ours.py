"""The losses of megakd_kernels as means over rows; functions are looked up when they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import megakd_kernels as mk
from bench.cases import BETA, SKEW, Case
from bench.problem import DTYPES, Loss, Problem
from megakd_kernels.chunking import (
    add_weight_gradient_,
    gradient_dtype,
    input_gradient_into,
    logits_buffer,
    plan_row_chunks,
    project_into,
    slices,
)
from megakd_kernels.row_plan import RowPlan
from megakd_kernels.row_terms import RowFactors, RowScorer, row_kernel
from megakd_kernels.settings import resolve_implementation

ROWS_PER_LAUNCH = 1024


def load(case: Case, impl: str) -> Loss:
    """The loss of the case with that impl; "gemms" has the products alone and ignores it."""
    loss = _LOSSES[case.kind]
    return lambda problem: loss(problem, impl)


def _divergence_options(case: Case) -> dict[str, Any]:
    return {
        "divergence": dict(case.mixture),
        "beta": BETA,
        "skew": SKEW,
        "temperature": case.temperature,
        "t_squared": False,
        "ce_weight": case.ce_weight,
        "reduction": "mean",
    }


def _linear_kd(problem: Problem, impl: str) -> Tensor:
    return mk.linear_kd_loss(
        problem.student, problem.student_weight, problem.teacher, problem.teacher_weight,
        problem.labels if problem.case.ce_weight else None,
        impl=impl, **_divergence_options(problem.case),
    ).loss  # fmt: skip


def _linear_ce(problem: Problem, impl: str) -> Tensor:
    return mk.linear_kd_loss(
        problem.student, problem.student_weight, labels=problem.labels, t_squared=False,
        ce_weight=1.0, reduction="mean", impl=impl,
    ).loss  # fmt: skip


def _linear_stats(problem: Problem, impl: str) -> Tensor:
    stats = mk.linear_stats(
        problem.student, problem.student_weight, problem.teacher, problem.teacher_weight,
        problem.labels, impl=impl,
    )  # fmt: skip
    sums = stats.kl_sum + stats.ce_sum + stats.teacher_entropy_sum + stats.agreement
    return sums / stats.n_valid


def _topk(problem: Problem, impl: str) -> Tensor:
    return mk.topk_kd_loss(
        problem.student, problem.student_weight, problem.topk_ids, problem.topk_logprobs,
        mode="renorm", temperature=problem.case.temperature, t_squared=False, reduction="mean",
        impl=impl,
    ).loss  # fmt: skip


def _logits(problem: Problem, impl: str) -> Tensor:
    return mk.kd_loss_from_logits(
        problem.student, problem.teacher, problem.labels if problem.case.ce_weight else None,
        impl=impl, **_divergence_options(problem.case),
    ).loss  # fmt: skip


def _rows(problem: Problem, impl: str) -> Tensor:
    """The work of linear_kd between its matrix products, in launches of equal length."""
    case, count = problem.case, len(problem.student)
    plan = RowPlan(
        mixture=case.mixture, beta=BETA, skew=SKEW, temperature=case.temperature,
        value_scale=1.0, shared=case.v, with_ce=False, with_gradient=True,
    )  # fmt: skip
    valid = torch.ones(count, dtype=torch.bool, device=problem.student.device)
    factors = RowFactors(valid=valid, labels=None, kd=valid.float(), ce=(~valid).float())
    kernel = row_kernel(impl, plan, block=ROWS_PER_LAUNCH, like=factors.kd)
    scorer = RowScorer(kernel, plan, factors, ROWS_PER_LAUNCH)
    gradient = torch.empty_like(problem.student[:ROWS_PER_LAUNCH], dtype=DTYPES[case.dtype])
    for part in slices(count, ROWS_PER_LAUNCH):
        student = problem.student[part]
        scorer.run_(part, student, problem.teacher[part], gradient[: len(student)])
    return scorer.values().total / count


def _gemms(problem: Problem, impl: str) -> Tensor:
    """The products of linear_kd in its chunks, and nothing between them.

    The gradient of the logits is whatever its buffer holds.
    """
    student, weight = problem.student, problem.student_weight
    teacher, teacher_weight = problem.teacher, problem.teacher_weight
    like = student.new_empty(0, dtype=torch.float32)
    narrow, count = gradient_dtype(student, like.dtype), len(student)
    plan = plan_row_chunks(
        count, widths=(len(weight), len(teacher_weight)), like=like, gradient=narrow,
        chunk_mb=0.0, implementation=resolve_implementation(impl, student.device),
    )  # fmt: skip
    logits, soft = (logits_buffer(plan.chunk, len(each), like) for each in (weight, teacher_weight))
    gradient = logits_buffer(plan.group, len(weight), like, narrow).zero_()
    input_gradient = like.new_empty(student.shape)
    weight_gradient = like.new_empty(weight.shape)
    for group in slices(count, plan.group):
        hidden = student[group]
        for part in slices(len(hidden), plan.chunk):
            rows = part.stop - part.start
            project_into(logits[:rows], hidden[part], weight, None)
            project_into(soft[:rows], teacher[group][part], teacher_weight, None)
        input_gradient_into(input_gradient[group], gradient[: len(hidden)], weight)
        add_weight_gradient_(
            weight_gradient, gradient[: len(hidden)], hidden, is_first=group.start == 0
        )
    return input_gradient[0, 0] + weight_gradient[0, 0]


def _hidden(problem: Problem, impl: str) -> Tensor:
    loss = getattr(mk, f"{problem.case.kind}_projection_loss")
    tensors = (problem.student, problem.student_weight, problem.teacher)
    return loss(*tensors, valid=None, impl=impl) / problem.case.n


def _relation(problem: Problem, impl: str) -> Tensor:
    total = mk.relation_kl_loss(
        problem.student, problem.teacher, heads=problem.case.heads, valid=None, impl=impl
    )
    return total / problem.case.n


_LOSSES = {
    "linear_kd": _linear_kd,
    "linear_ce": _linear_ce,
    "linear_stats": _linear_stats,
    "topk": _topk,
    "logits": _logits,
    "rows": _rows,
    "gemms": _gemms,
    "hidden_mse": _hidden,
    "hidden_cosine": _hidden,
    "relation": _relation,
}
