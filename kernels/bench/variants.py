"""Launches of every Triton kernel, as the public functions make them for bf16 models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

import megakd_kernels as mk
from megakd_kernels.row_plan import NO_BIASES, Biases, RowInputs, RowPlan
from megakd_kernels.triton import row_hidden
from megakd_kernels.triton.row_kd import TritonRows

ALL = tuple(mk.DIVERGENCES)
_ROWS, _WIDTH = 4, 4096
_BOTH = Biases(*torch.zeros(2, _WIDTH, dtype=torch.bfloat16))


def rows(
    *divergences: str,
    with_ce: bool = False,
    temperature: float = 1.0,
    width: int = _WIDTH,
    biases: Biases = NO_BIASES,
) -> None:
    """The rows of `linear_kd_loss`: fp32 logits, a bf16 gradient elsewhere."""
    logits = torch.zeros(_ROWS, -(-width // 64) * 64)[:, :width]
    valid, factor = torch.ones(_ROWS, dtype=torch.bool), torch.ones(_ROWS)
    plan = RowPlan(
        mixture=tuple((name, 1.0) for name in divergences), beta=0.5, skew=0.1,
        temperature=temperature, value_scale=1.0, shared=width, with_ce=with_ce,
        with_gradient=True,
    )  # fmt: skip
    labels = torch.zeros(_ROWS, dtype=torch.int64) if with_ce else None
    inputs = RowInputs(valid, labels, factor, factor)
    gradient = torch.zeros(_ROWS, logits.stride(0), dtype=torch.bfloat16)[:, :width]
    TritonRows(plan=plan, biases=biases).run_(logits, logits, inputs, gradient)


def statistics() -> None:
    """The rows of `linear_stats`."""
    hidden, weight = torch.zeros(16, 64), torch.zeros(_WIDTH, 64)
    labels = torch.zeros(16, dtype=torch.int64)
    mk.linear_stats(hidden, weight, hidden, weight, labels, impl="triton")


def warped() -> None:
    """Rows of fp32 models with a capped student and a scaled teacher."""
    hidden, weight = torch.zeros(16, 64).requires_grad_(), torch.zeros(2048, 64)
    heads = (hidden, weight, hidden.detach(), weight)
    mk.linear_kd_loss(*heads, t_squared=False, softcap_s=30.0, logit_scale_t=0.5, impl="triton")


def top_k() -> None:
    """The rows of `topk_kd_loss`."""
    hidden = torch.zeros(16, 64, dtype=torch.bfloat16).requires_grad_()
    weight = torch.zeros(_WIDTH, 64, dtype=torch.bfloat16)
    ids = torch.arange(8).repeat(16, 1)
    labels = torch.zeros(16, dtype=torch.int64)
    mk.topk_kd_loss(
        hidden, weight, ids, torch.full((16, 8), -3.0), labels, mode="tail", ce_weight=1.0,
        t_squared=False, impl="triton",
    )  # fmt: skip


def hidden_states(kernel: Callable[..., object]) -> None:
    """States of equal width."""
    states = torch.zeros(_ROWS, _WIDTH, dtype=torch.bfloat16)
    kernel(states, states, torch.ones(_ROWS, dtype=torch.bool), torch.zeros_like(states))


def relation(*, width: int = 64, teacher_width: int = 128, with_keys: bool = False) -> None:
    """Forward and backward of a causal relation, with keys also of segments."""
    states = torch.zeros(1, 64, 4 * width, dtype=torch.bfloat16).requires_grad_()
    teacher = torch.zeros(1, 64, 4 * teacher_width, dtype=torch.bfloat16)
    keys = (torch.zeros_like(states).requires_grad_(), teacher) if with_keys else ()
    segments = torch.zeros(1, 64, dtype=torch.int64) if with_keys else None
    valid = torch.ones(1, 64, dtype=torch.bool)
    mk.relation_kl_loss(
        states, teacher, *keys, heads=4, valid=valid, impl="triton", causal=True,
        segments=segments,
    ).backward()  # fmt: skip


VARIANTS: Mapping[str, Callable[[], None]] = {
    "forward KL": partial(rows, "forward_kl"),
    "reverse KL": partial(rows, "reverse_kl"),
    "forward KL and cross-entropy, T = 2": partial(
        rows, "forward_kl", with_ce=True, temperature=2.0
    ),
    "JSD": partial(rows, "jsd"),
    "skew KL": partial(rows, "skew_kl"),
    "skew reverse KL": partial(rows, "skew_rkl"),
    "TVD": partial(rows, "tvd"),
    "all six and cross-entropy, T = 2": partial(rows, *ALL, with_ce=True, temperature=2.0),
    "forward KL, V = 5041": partial(rows, "forward_kl", width=5041),
    "JSD, V = 5041": partial(rows, "jsd", width=5041),
    "forward KL, heads with a bias": partial(rows, "forward_kl", biases=_BOTH),
    "capped and scaled logits": warped,
    "statistics": statistics,
    "top-k": top_k,
    "hidden-state MSE": partial(hidden_states, row_hidden.squared_error_rows),
    "hidden-state cosine": partial(hidden_states, row_hidden.one_minus_cosine_rows),
    "relation": relation,
    "relation of queries with keys": partial(relation, with_keys=True),
    "relation, heads of 128": partial(relation, width=128),
    "relation of queries with keys, heads of 128": partial(relation, width=128, with_keys=True),
}
