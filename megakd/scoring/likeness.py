"""How alike a teacher and a student answer the same micro-batches.

Shapes: N targets of a micro-batch, V tokens or classes of a model, W of both models, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from megakd.contract.batch import IGNORE, Batch, Knowledge
from megakd.engine.collectives import all_reduce_
from megakd.models.next_tokens import LOGITS_AT_ONCE

TOP = 5
"""Number of the likeliest answers of two models whose overlap is measured."""


class Likeness:
    """Means over all targets of the micro-batches that were added.

    `kl`: KL(teacher || student) in nats; `entropy`, `start_entropy`: of the answers of teacher and
    student in nats; `same_top`: share of targets with the same likeliest answer; `overlap`: share
    of the likeliest answers of one model that are among those of the other (Li et al. 2026,
    https://arxiv.org/abs/2604.13016). They are over the tokens or classes that both models have.
    Regressors have only `squared_difference`, of their scores.
    """

    def __init__(self) -> None:
        self._count, self._sums = torch.zeros((), dtype=torch.float64), dict[str, Tensor]()

    @torch.no_grad()
    def add(self, student: Knowledge, teacher: Knowledge, batch: Batch) -> None:
        """Add the outputs of both models for a micro-batch; the heads are open."""
        compared = _scores if batch.labels.is_floating_point() else _distributions
        for ours, theirs in _answers(student, teacher, batch):
            self._count += len(ours)
            for name, values in compared(ours, theirs).items():
                self._sums[name] = self._sums.get(name, 0) + values.double().sum().cpu()

    def means(self) -> dict[str, float]:
        """Return the means by name, the same on every rank; a collective."""
        sums = all_reduce_(torch.stack([self._count, *self._sums.values()]))
        return dict(zip(self._sums, (sums[1:] / sums[0].clamp(min=1)).tolist(), strict=True))


def top_of(width: int) -> int:
    """Return how many of `width` answers are compared: at most half, because all would overlap."""
    return max(1, min(TOP, width // 2))


def _answers(
    student: Knowledge, teacher: Knowledge, batch: Batch
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the fp32 logits or scores [N, V] of both models, of a language model in blocks."""
    if student.logits is not None and teacher.logits is not None:
        rows = batch.valid.any(dim=1)
        yield student.logits[rows].float(), teacher.logits[rows].float()
        return
    targets = (batch.target_labels.flatten() != IGNORE).nonzero().squeeze(1)
    most = LOGITS_AT_ONCE.get(targets.device.type, LOGITS_AT_ONCE["cpu"])
    wide = max(len(_logits(model, targets[:1]).T) for model in (student, teacher))
    for some in targets.split(max(1, most // wide)):
        yield _logits(student, some), _logits(teacher, some)


def _logits(model: Knowledge, rows: Tensor) -> Tensor:
    if model.hidden is None or model.head is None:
        raise TypeError("a language model was read without its hidden states")
    weight, bias = model.head.read()
    product = functional.linear(model.hidden.flatten(0, -2)[rows], weight, bias)
    return model.head.warp(product.float())


def _distributions(student: Tensor, teacher: Tensor) -> Mapping[str, Tensor]:
    width = min(student.shape[-1], teacher.shape[-1])
    ours, theirs = (logits[:, :width].log_softmax(-1) for logits in (student, teacher))
    best = [logits.topk(top_of(width), dim=-1).indices for logits in (ours, theirs)]
    both = best[0][:, :, None] == best[1][:, None, :]  # [N, k, k]
    return {
        "kl": (theirs.exp() * (theirs - ours)).sum(-1),
        "entropy": torch.special.entr(theirs.exp()).sum(-1),
        "start_entropy": torch.special.entr(ours.exp()).sum(-1),
        "same_top": both[:, 0, 0],
        "overlap": both.any(-1).double().mean(-1),
    }


def _scores(student: Tensor, teacher: Tensor) -> Mapping[str, Tensor]:
    return {"squared_difference": (student - teacher).square()}
