"""The losses in plain eager torch, the reference for tests of the other code paths.

Every function forms the full logits and leaves the gradient to autograd. Computation is in fp32,
or in fp64 if an input is fp64. Shapes: N rows, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_kernels.inputs import Rows, all_count, compute_dtype
from megakd_kernels.row_losses import chance_of_id, chance_of_match
from megakd_kernels.row_plan import Warp
from megakd_kernels.row_terms import spread
from megakd_kernels.settings import KDOutput, Objective, as_scalar, reduction_scale, weighted_total


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return hidden [N, H] @ weight [V, H].T + bias [V] in `dtype`."""
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)


def kd_loss(
    student: Tensor,
    teacher: Tensor | None,
    rows: Rows,
    objective: Objective,
    shared: int,
    warps: tuple[Warp, Warp] = (Warp(), Warp()),
) -> KDOutput:
    """Return the distillation loss of raw logits [N, V]; `rows` says which rows count.

    Rows that do not count are removed, so that their values are not part of the graph. The
    results have the dtype of the weights of the rows.
    """
    dtype = compute_dtype(student, teacher)
    kept = None if all_count(rows.valid) else rows.valid.nonzero().squeeze(1)
    counted = rows if kept is None else rows.taken(kept)
    student = warped(_taken(student, kept).to(dtype), warps[0])
    values = student.new_zeros(0, len(student))
    if teacher is None:
        if counted.labels is None:
            raise ValueError("rows without a teacher need labels")
        agrees = chance_of_id(student.detach(), counted.labels, torch.empty_like(student))
        agrees = agrees * counted.labelled
    else:
        teacher = warped(_taken(teacher, kept).detach().to(dtype), warps[1])
        soft = _without_gradient_at_weight_0(student[:, :shared], objective)
        values = divergence_rows(soft, teacher[:, :shared], objective)
        both = (soft.detach(), teacher[:, :shared])
        ours, theirs = (logits - logits.amax(-1, keepdim=True) for logits in both)
        agrees = chance_of_match(ours, theirs, torch.empty_like(ours))
    ce = _cross_entropy_rows(student, counted, objective)
    weighted = values * counted.weight
    total, count = weighted_total(objective, weighted, ce), rows.valid.sum()
    if objective.reduction == "none":
        loss = _spread(total, kept, rows)
    else:
        # The sum over an empty slice keeps the graph connected if nothing counts.
        loss = total.sum() + student[:0].sum()
        loss = loss * reduction_scale(objective, count, total)
    divergences, hard = (_spread(part.detach(), kept, rows) for part in (weighted, ce))
    agreed = _spread(agrees, kept, rows)
    return KDOutput.of(loss.to(rows.weight.dtype), divergences, hard, agreed, count)


def _taken(values: Tensor, kept: Tensor | None) -> Tensor:
    """Return the values of the kept rows; None: all rows are kept."""
    return values if kept is None else values[kept]


def _spread(values: Tensor, kept: Tensor | None, rows: Rows) -> Tensor:
    """Return values [..., n] of the kept rows among all rows, in the dtype of the weights."""
    values = values.to(rows.weight.dtype)
    return values if kept is None else spread(values, kept, len(rows.valid))


def divergence_rows(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """Return each divergence of the mixture per row, [n_div, N], with T^2 if requested."""
    log_q = F.log_softmax(student / objective.temperature, dim=-1)
    log_p = F.log_softmax(teacher / objective.temperature, dim=-1)
    # See `_without_gradient_at_weight_0`.
    values = [
        _divergence(name, log_p, log_q if weight != 0 else log_q.detach(), objective)
        for name, weight in objective.mixture
    ]
    if not values:
        return student.new_zeros(0, len(student))
    return torch.stack(values) * objective.value_scale


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum p log(p / q) over the last dimension; 0 log 0 = 0."""
    return _expectation(log_p, log_p, log_q)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Return beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    Source: GKD, equation 1.
    """
    mixed = beta * log_p.exp() + (1 - beta) * log_q.exp()
    log_m = torch.where(mixed == 0, 1, mixed).log()
    student_part = _expectation(log_q, log_q, log_m)
    return beta * _expectation(log_p, log_p, log_m) + (1 - beta) * student_part


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """Return KL(p || m) with m = skew p + (1 - skew) q.

    Source: DistiLLM, equation 3; with p and q swapped, equation 4.
    """
    mixed = skew * log_p.exp() + (1 - skew) * log_q.exp()
    return _expectation(log_p, log_p, torch.where(mixed == 0, 1, mixed).log())


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the total variation distance, half the sum of |p - q|."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def warped(logits: Tensor, warp: Warp) -> Tensor:
    """Scale and softly cap raw logits: c tanh(scale z / c)."""
    scaled = logits * warp.scale
    return warp.softcap * torch.tanh(scaled / warp.softcap) if warp.softcap else scaled


def _divergence(name: str, log_p: Tensor, log_q: Tensor, objective: Objective) -> Tensor:
    values: dict[str, Callable[[], Tensor]] = {
        "forward_kl": lambda: forward_kl(log_p, log_q),
        "reverse_kl": lambda: forward_kl(log_q, log_p),
        "jsd": lambda: jsd(log_p, log_q, objective.beta),
        "skew_kl": lambda: skew_kl(log_p, log_q, objective.skew),
        "skew_rkl": lambda: skew_kl(log_q, log_p, objective.skew),
        "tvd": lambda: tvd(log_p, log_q),
        "teacher_entropy": lambda: -_expectation(log_p, log_p, torch.zeros_like(log_p)),
    }
    return values[name]()


def _expectation(log_weight: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Sum w (log a - log b); skip ids of weight 0, whose difference may be NaN."""
    weight = log_weight.exp()
    present = weight > 0
    difference = torch.where(present, log_a, 0) - torch.where(present, log_b, 0)
    return (weight * difference).sum(-1)


def _cross_entropy_rows(student: Tensor, rows: Rows, objective: Objective) -> Tensor:
    if not objective.wants_ce or rows.labels is None:
        return student.new_zeros(len(student))
    weight = rows.hard_weight
    # An unlabelled row has no loss, even where its placeholder id has the logit -inf.
    labels = torch.where(weight != 0, rows.labels, -100)
    return F.cross_entropy(student, labels, ignore_index=-100, reduction="none") * weight


def _without_gradient_at_weight_0(student: Tensor, objective: Objective) -> Tensor:
    """Return the logits of the divergences; their gradient is 0 if kd_weight is 0.

    Autograd would form 0 times the infinite slope of an infinite divergence, which is NaN.
    """
    if not isinstance(objective.kd_weight, Tensor):
        return student if objective.kd_weight != 0 else student.detach()
    weight = as_scalar(objective.kd_weight, student)
    return torch.where(weight != 0, student, student.detach())
