"""Statistics of the next-token distributions of student and teacher, summed in groups of targets.

Shapes: B rows of a micro-batch, T positions, N positions that are predicted, K groups, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

import megakd_kernels
from megakd.contract.batch import Head, Knowledge, LossInputs

TOKENS, ENTROPY, KL, TEACHER_ENTROPY = range(4)
"""Columns of `sums_by_group`."""


@torch.no_grad()
def sums_by_group(reading: LossInputs, groups: Tensor, count: int) -> Tensor:
    """Return sums over the targets of each group, without logits of the shape [N, V].

    Under ZeRO 3, call this inside the student's forward with both heads open.

    Args:
        groups: [B, T] int64 number of the group of each position, from 0 to `count` - 1; -1 for
            positions that do not count.

    Returns:
        [K, 4] fp64: number of targets, and sums in nats of the entropy of the student, of
        KL(teacher || student), and of the entropy of the teacher. The divergence and the entropy
        of the teacher are over the tokens that both models have, and NaN if the answers of the
        teacher are not hidden states of the same positions, as in a cache.
    """
    flat = groups.flatten()
    if reading.batch.targets is not None:
        flat = flat[reading.batch.targets]
    student = _rows(reading.student)
    if student is None:
        raise TypeError("a language model was read without its hidden states")
    teacher = None if reading.teacher is None else _rows(reading.teacher)
    if teacher is not None and len(teacher[0]) != len(student[0]):
        teacher = None
    return torch.stack(
        [
            _sums(student, teacher, (flat == number).nonzero().squeeze(1), reading.kernels)
            for number in range(count)
        ]
    )


Rows = tuple[Tensor, Head]
"""Hidden states [N, D] of the positions that a model predicts, and the head of the model."""


def _rows(answer: Knowledge) -> Rows | None:
    if answer.hidden is None or answer.head is None:
        return None
    return answer.hidden.detach().flatten(0, -2), answer.head


def _sums(student: Rows, teacher: Rows | None, rows: Tensor, kernels: str) -> Tensor:
    _, entropy = _compared(student, student, rows, kernels)
    none = torch.full_like(entropy, float("nan"))
    kl, taught = (none, none) if teacher is None else _compared(student, teacher, rows, kernels)
    return torch.stack([torch.full_like(entropy, len(rows)), entropy, kl, taught])


def _compared(student: Rows, teacher: Rows, rows: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    (hidden_s, head_s), (hidden_t, head_t) = student, teacher
    (weight_s, bias_s), (weight_t, bias_t) = head_s.read(), head_t.read()
    stats = megakd_kernels.linear_stats(
        hidden_s[rows], weight_s, hidden_t[rows], weight_t,
        student_bias=bias_s, teacher_bias=bias_t,
        softcap_s=head_s.warp.softcap, softcap_t=head_t.warp.softcap,
        logit_scale_s=head_s.warp.scale, logit_scale_t=head_t.warp.scale,
        impl=kernels,
    )  # fmt: skip
    return stats.kl_sum.double(), stats.teacher_entropy_sum.double()
