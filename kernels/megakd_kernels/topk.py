"""Distillation from a cached teacher: its k most likely ids and their log-probabilities.

This module checks, flattens and forms the teacher's targets; `topk_ops` forms values and
gradients chunk by chunk. Shapes: N rows, V vocabulary, H width, k ids kept.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_kernels import formed, reference, topk_ops
from megakd_kernels.heads import checked_side
from megakd_kernels.inputs import (
    Masks,
    Rows,
    check_constants,
    check_integers,
    compute_dtype,
    may_look_at,
    needs_gradient,
    select_rows,
    without_autocast,
)
from megakd_kernels.linear_chunks import Side
from megakd_kernels.normalisation import Normalisation
from megakd_kernels.row_losses import chance_of_id
from megakd_kernels.row_terms import RowValues
from megakd_kernels.row_topk import TopK
from megakd_kernels.settings import KDOutput, Number, Objective, one_of, resolve_implementation

TOPK_MODES = ("renorm", "tail")
# Error bound of the log_softmax that filled the cache, in machine epsilons of its dtype.
_ROUNDINGS = 32.0


class _Cache(NamedTuple):
    """ids [N, k] int64, below 0 for missing entries; logprobs [N, k] as cached, -inf if missing."""

    ids: Tensor
    logprobs: Tensor


def topk_kd_loss(  # noqa: PLR0913, the public contract: options are keyword-only
    student_hidden: Tensor,
    student_weight: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    labels: Tensor | None = None,
    *,
    mode: str = "renorm",
    temperature: float = 1.0,
    t_squared: bool,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    num_items: Number | None = None,
    reduction: str = "sum",
    student_bias: Tensor | None = None,
    chunk_mb: float | None = None,
    impl: str = "auto",
) -> KDOutput:
    """Return KL(teacher || student) on the teacher's k best ids, and cross-entropy, in nats.

    With K the ids of a row, p the teacher and q the student, both at `temperature`:
    "renorm" renormalises the teacher on K and compares it with q over the whole vocabulary,
    sum_K p (log p - log q); "tail" joins all ids not in K into one id, on both sides, with the
    remaining probability (no id, if the remainder is within the rounding of the cache), so that
    the loss is at most the full KL and at least 0. With ids drawn at random from the teacher's
    softmax and the logarithms of their shares in the draws, "renorm" has an unbiased gradient of
    the full KL (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870). If K is the whole
    vocabulary, both modes equal forward_kl of `linear_kd_loss`. As in `linear_kd_loss`, gradients
    are formed in the forward.

    Args:
        student_hidden: [N, Hs] or [B, T, Hs], any strides, fp32, bf16, fp16 or fp64.
        student_weight: [V, Hs].
        topk_ids: [N, k] or [B, T, k] integer ids, distinct within a row; below 0 for missing
            entries.
        topk_logprobs: like topk_ids, natural logarithms of the teacher's softmax over its whole
            vocabulary at temperature 1, or of the shares of draws from it.
        labels: [N] or [B, T] integer ids. None: every row counts, unless its token_weight is 0.
        mode: "renorm" or "tail"; see above.
        temperature: above 0. "tail" needs temperature 1, because the cache does not give the
            probability of the missing ids at other temperatures.
        t_squared: multiply the divergence (value and gradient) by temperature^2.
        kd_weight: factor of the divergence; number or 0-d tensor.
        ce_weight: factor of cross-entropy at temperature 1 over all ids; number or 0-d tensor.
            The number 0 skips it.
        token_weight: [N] or [B, T]; rows of weight 0 do not count and may hold anything.
        ignore_index: label of rows that do not count and may hold anything.
        num_items: divisor of reduction "num_items"; number or 0-d tensor.
        reduction: "sum"; "mean" over the valid rows; "num_items"; "none": [N] or [B, T],
            allowed only without gradient.
        student_bias: [V].
        chunk_mb: budget of the chunk buffers in MiB; None: 1024 on a GPU, 64 on a CPU.
        impl: "triton", "chunked", "reference", or "auto", which MEGAKD_KERNELS overrides.

    Returns:
        KDOutput; divergence_sums is [1], and agreement counts the rows whose most likely student
        id is the most likely id of the cache. A row without an id has the divergence 0. Without
        a valid row the loss and all gradients are 0.

    Raises:
        ValueError: unknown name, option out of range, mismatched shapes, reduction "none" while a
            gradient is needed, or an invalid cache. A cache is checked only on a CPU; it is
            invalid if an id is outside the vocabulary or occurs twice in a row, or if
            probabilities exceed 1. On an accelerator an id outside the vocabulary gives its row
            a loss of NaN.
    """
    objective = Objective(
        divergence="forward_kl", beta=0.5, skew=0.1, temperature=temperature,
        t_squared=t_squared, kd_weight=kd_weight, ce_weight=ce_weight, reduction=reduction,
        num_items=num_items, chunk_mb=chunk_mb,
    )  # fmt: skip
    _check_mode(mode, objective)
    student = checked_side("student", student_hidden, student_weight, student_bias)
    _check_shapes(student_hidden, topk_ids, topk_logprobs)
    check_constants(topk_logprobs=topk_logprobs, token_weight=token_weight)
    objective.check_inputs(
        has_teacher=True,
        has_labels=labels is not None,
        needs_grad=any(needs_gradient(tensor) for tensor in student),
    )
    ids = len(student.weight)
    rows = select_rows(
        len(student.hidden),
        like=student.hidden.new_empty((), dtype=compute_dtype(*student)),
        masks=Masks(labels, token_weight, ignore_index).checked(student_hidden.shape[:-1]),
        ids=ids if objective.wants_ce else None,
    )
    cache, rows = _cache(topk_ids, topk_logprobs, rows, ids)
    teacher = _soft_targets(cache, mode, objective, rows.weight)
    implementation = resolve_implementation(impl, student.hidden.device)
    with without_autocast(student.hidden.device):
        if implementation == "reference":
            output = _reference(student, teacher, rows, objective)
        else:
            output = _formed(student, teacher, rows, objective, implementation)
    if reduction == "none":
        return output._replace(loss=output.loss.reshape(student_hidden.shape[:-1]))
    return output


def _formed(
    student: Side, teacher: TopK, rows: Rows, objective: Objective, implementation: str
) -> KDOutput:
    normalised = Normalisation.of(rows, objective, with_teacher=True)
    values = formed.run(
        topk_ops.topk_kd, *student, *teacher, rows.valid, rows.labels,
        # A row without an id has no gradient; the product keeps a NaN.
        normalised.kd_factor * (teacher.best >= 0), normalised.ce_factor,
        [needs_gradient(tensor) for tensor in student],
        float(objective.temperature), float(objective.value_scale), objective.wants_ce,
        implementation, objective.chunk_mb or 0.0,
    )  # fmt: skip
    return normalised.output(RowValues(*values[:4]))


def _soft_targets(cache: _Cache, mode: str, objective: Objective, like: Tensor) -> TopK:
    """Return the target of every row in like's dtype, formed in fp64 because it is small."""
    exact = cache.logprobs.double()
    best = cache.ids.gather(1, exact.argmax(1, keepdim=True)).squeeze(1)
    has_ids = (exact != -math.inf).any(1, keepdim=True)
    if mode == "renorm":
        # A row without an id has no target; its log_softmax would be NaN.
        exact = torch.where(has_ids, exact / objective.temperature, 0).log_softmax(1)
        log_p = torch.where(has_ids & (cache.ids >= 0), exact, -math.inf)
        rest = torch.zeros_like(exact[:, 0])
    else:
        mass = exact.exp().sum(1)
        # A remainder within the rounding of the cache is no tail; then the ids get all probability.
        has_rest = 1 - mass > _rounding(cache)
        rest = torch.where(has_rest, 1 - mass, 0)
        log_p = exact - torch.where(has_rest, 0, mass.log())[:, None]
    best = torch.where(has_ids.squeeze(1), best, -1)
    return TopK(cache.ids, log_p.to(like.dtype), rest.to(like.dtype), best)


def _rounding(cache: _Cache) -> Tensor:
    """Return [N], a bound on the error of the probability sum from rounded logarithms.

    The bound includes the rounding of log_softmax, in fp32 or better, and of the cached dtype.
    """
    kept = torch.finfo(cache.logprobs.dtype).eps
    computed = min(kept, torch.finfo(torch.float32).eps)
    exact = cache.logprobs.double()
    size = torch.where(exact > -math.inf, exact.exp() * exact.abs(), 0).sum(1)
    return _ROUNDINGS * computed + kept * size


def _reference(student: Side, teacher: TopK, rows: Rows, objective: Objective) -> KDOutput:
    """Compute the loss from full logits; autograd computes the gradient."""
    valid = rows.valid
    kept = teacher.rows(valid)
    # Rows that are not valid are removed, so that their values are not part of the graph.
    logits = reference.project(
        student.hidden[valid], student.weight, student.bias, rows.weight.dtype
    )
    divergence = _divergence(logits, kept, objective)
    ce = torch.zeros_like(divergence)
    if objective.wants_ce and rows.labels is not None:
        ce = F.cross_entropy(logits, rows.labels[valid], reduction="none")
    agrees = chance_of_id(logits.detach(), kept.best.clamp(min=0), torch.empty_like(logits))
    agrees = agrees * (kept.best >= 0)
    zeros = torch.zeros_like(rows.weight)
    divergence = zeros.masked_scatter(valid, divergence)
    ce = zeros.masked_scatter(valid, ce)
    normalised = Normalisation.of(rows, objective, with_teacher=True)
    agreement = zeros.masked_scatter(valid, agrees)
    values = normalised.factors.values([1.0], divergence[None], ce, agreement)
    # The sum over an empty slice keeps the graph connected if no row is valid.
    return normalised.output(values._replace(total=values.total + logits[:0].sum()))


def _divergence(logits: Tensor, teacher: TopK, objective: Objective) -> Tensor:
    """Return the divergence [n] in nats, with value_scale."""
    scaled = logits / objective.temperature
    index = teacher.ids.clamp(min=0)
    is_kept = teacher.ids >= 0
    log_q = scaled.log_softmax(1).gather(1, index)
    p = teacher.log_p.exp()
    gap = torch.where(p == 0, 0, teacher.log_p) - torch.where(p == 0, 0, log_q)
    value = (p * gap).sum(1)
    has_rest = teacher.rest > 0
    # Rows without a rest keep their ids: the logarithm of an empty sum has no derivative.
    hidden = torch.zeros_like(logits).scatter_add(1, index, (is_kept & has_rest[:, None]).to(p))
    others = scaled.masked_fill(hidden > 0, -math.inf).logsumexp(1) - scaled.logsumexp(1)
    rest = torch.where(has_rest, teacher.rest, 1)
    value = value + torch.where(has_rest, rest * (rest.log() - others), 0)
    return value * objective.value_scale


def _cache(ids: Tensor, logprobs: Tensor, rows: Rows, vocabulary: int) -> tuple[_Cache, Rows]:
    """Check and return the cache of rows that count.

    An id outside the vocabulary makes the weight of its row NaN.
    """
    ids = ids.detach().reshape(-1, ids.shape[-1]).long()
    # Rows that do not count may hold anything.
    ids = torch.where(rows.valid[:, None], ids, -1)
    is_known = ids < vocabulary
    weight = torch.where(is_known.all(1), rows.weight, math.nan * rows.weight)
    logprobs = logprobs.detach().reshape(ids.shape)
    if may_look_at(ids):
        _check_ids(ids, is_known, vocabulary)
    ids = torch.where(is_known, ids, -1)
    cache = _Cache(ids, logprobs.masked_fill(ids < 0, -math.inf))
    if may_look_at(ids):
        _check_logprobs(cache)
    return cache, rows._replace(weight=weight)


def _check_ids(ids: Tensor, is_known: Tensor, vocabulary: int) -> None:
    unknown = ids[~is_known]
    if unknown.numel():
        raise ValueError(
            f"topk_ids hold {int(unknown[0])}, and the student has {vocabulary} ids: the cache was "
            "made for another vocabulary"
        )
    ordered = ids.sort(1).values
    twice = ordered[:, 1:][(ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)]
    if twice.numel():
        raise ValueError(f"topk_ids hold {int(twice[0])} twice in one row; ids must be different")


def _check_logprobs(cache: _Cache) -> None:
    mass = cache.logprobs.double().exp().sum(1)
    rounding = _rounding(cache)
    are_small = (cache.logprobs.double() <= rounding[:, None]).all(1)
    is_right = are_small & (mass <= 1 + rounding)  # NaN is neither
    if not bool(is_right.all()):
        row = int((~is_right).nonzero()[0])
        raise ValueError(
            f"topk_logprobs of row {row} have a maximum of {float(cache.logprobs[row].max()):.6g} "
            f"and probabilities that sum to {float(mass[row]):.6g}; they must be log-probabilities "
            "of a softmax at temperature 1, at most 0 and at most 1"
        )


def _check_mode(mode: str, objective: Objective) -> None:
    one_of("mode", mode, TOPK_MODES)
    if mode == "tail" and objective.temperature != 1.0:
        raise ValueError(
            f"mode {mode!r} at temperature {objective.temperature}: the cache holds "
            "log-probabilities at temperature 1, which do not determine the weight of the other "
            "ids at another temperature; use temperature 1, or mode 'renorm'"
        )


def _check_shapes(hidden: Tensor, ids: Tensor, logprobs: Tensor) -> None:
    if ids.shape != logprobs.shape or ids.shape[:-1] != hidden.shape[:-1] or not ids.shape[-1]:
        raise ValueError(
            f"topk_ids are {list(ids.shape)} and topk_logprobs {list(logprobs.shape)} for "
            f"student_hidden {list(hidden.shape)}; they must be [..., k] with k above 0"
        )
    check_integers(topk_ids=ids)
    if not logprobs.is_floating_point():
        raise ValueError(f"topk_logprobs are {logprobs.dtype}; they must be floating point")
