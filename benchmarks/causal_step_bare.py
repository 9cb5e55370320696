"""The bare loop of `causal_step.py`: plain PyTorch with full logits of both models."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from causal_step_case import LEARNING_RATE, MAX_GRAD_NORM, Sizes, llama
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    Loss = Callable[[Tensor, Tensor], Tensor]

BETA = 0.5
MIXTURES = ("logaddexp", "stacked")


class Models(NamedTuple):
    """A student and a frozen teacher of transformers."""

    student: LlamaForCausalLM
    teacher: LlamaForCausalLM


class Steps(Protocol):
    """One way of taking a step; batches are numbered, and both sides of a pair have them."""

    def step(self, index: int) -> None:
        """Take the step of a batch; every batch is used once, in order."""
        ...

    def loss(self, index: int) -> float:
        """Return the loss of a batch in nats per target, without learning."""
        ...


class Side(Steps, Protocol):
    """A side that is compared with a bare loop."""

    def bare(self, loss: Loss) -> Bare:
        """Return a bare loop that starts from the same weights and sees the same batches."""
        ...


class Bare:
    """The bare loop: forward of both models, loss, backward, clipping, AdamW."""

    def __init__(self, models: Models, ids: Sequence[Tensor], loss: Loss) -> None:
        self._models, self._ids, self._loss = models, ids, loss
        matrices = [p for p in models.student.parameters() if p.dim() > 1]
        others = [p for p in models.student.parameters() if p.dim() <= 1]
        self._parameters = [*matrices, *others]
        # The groups of megakd: matrices and others, both without decay by default.
        groups = [{"params": group, "weight_decay": 0.0} for group in (matrices, others)]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
        models.student.train()
        models.teacher.eval().requires_grad_(requires_grad=False)

    def step(self, index: int) -> None:
        """Take the step of a batch."""
        self._forward(self._ids[index]).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def loss(self, index: int) -> float:
        """Return the loss of a batch in nats per target, without learning."""
        return float(self._forward(self._ids[index]))

    def bare(self, loss: Loss) -> Bare:
        """Return another bare loop from the same weights."""
        return Bare(Models(*map(plain_copy, self._models)), self._ids, loss)

    def _forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            soft = self._models.teacher(input_ids=ids, use_cache=False).logits
        logits = self._models.student(input_ids=ids, use_cache=False).logits
        targets = ids[:, 1:].numel()
        return self._loss(logits[:, :-1].float(), soft[:, :-1].float()) / targets


def loss_of(divergence: str, mixture: str) -> Loss:
    """Return the loss between logits [B, T, V] of the student and of the teacher, a sum in nats.

    Args:
        divergence: `forward_kl` or `jsd`.
        mixture: how jsd forms the logarithms of the mixture; see `jsd`.
    """
    return forward_kl if divergence == "forward_kl" else functools.partial(jsd, mixture=mixture)


def forward_kl(logits: Tensor, soft: Tensor) -> Tensor:
    """Return KL(teacher || student)."""
    return _kl(F.log_softmax(soft, dim=-1), F.log_softmax(logits, dim=-1))


def jsd(logits: Tensor, soft: Tensor, *, mixture: str) -> Tensor:
    """Return the Jensen-Shannon divergence with weights of one half.

    Args:
        logits: of the student.
        soft: of the teacher.
        mixture: `logaddexp`, or `stacked`, TRL's logsumexp of both stacked, which takes longer.
    """
    log_q, log_p = F.log_softmax(logits, dim=-1), F.log_softmax(soft, dim=-1)
    if mixture == "stacked":
        shares = [log_q + math.log1p(-BETA), log_p + math.log(BETA)]
        log_m = torch.logsumexp(torch.stack(shares), dim=0)
    else:
        log_m = torch.logaddexp(log_p, log_q) + math.log(BETA)
    return BETA * _kl(log_p, log_m) + (1 - BETA) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, reduction="sum", log_target=True)


def random_models(sizes: Sizes) -> Models:
    """Return both models with random weights, the same at every call."""
    torch.manual_seed(0)
    configs = (llama(size, sizes) for size in (sizes.student, sizes.teacher))
    return Models(
        *(LlamaForCausalLM(LlamaConfig(**c, vocab_size=sizes.vocabulary)) for c in configs)
    )


def random_ids(sizes: Sizes, count: int) -> list[Tensor]:
    """Return token numbers [B, T] of so many batches, the same at every call."""
    drawn = torch.Generator().manual_seed(0)
    shape = (sizes.rows, sizes.length)
    return [torch.randint(sizes.vocabulary, shape, generator=drawn) for _ in range(count)]


def plain_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a model with the same weights, which no engine knows."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy
