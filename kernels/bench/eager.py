"""The losses in plain torch over full logits, as Hugging Face's models and trainers write them.

They are the peers "eager" and "compile" and, in fp64, the truth that errors are measured
against. Products run in the type of the model, everything after them in fp32. Every loss is a
mean over rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.cases import BETA, SKEW, Case
from bench.problem import Loss, Problem

TRL_ROWS = 256  # _CHUNKED_LM_HEAD_CHUNK_SIZE of trl/trainer/distillation_trainer.py, TRL 1.12


def load(case: Case) -> Loss:
    """The eager loss of the case."""
    return _LOSSES[case.kind]


def load_compiled(case: Case, mode: str = "default") -> Loss:
    """torch.compile of the same function; compiled at the first call, for its shapes."""
    return torch.compile(load(case), dynamic=False, fullgraph=True, mode=mode)


def load_trl_chunks(case: Case) -> Loss:
    """TRL 1.12, _chunked_divergence_loss and _chunk (huggingface/trl#6526).

    256 rows at a time, both products in fp32 inside the checkpoint, which runs them again in
    the backward. Left out are the sorting of ignored rows and the entropy it reports.
    """

    def chunk(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
        logits = student.float() @ weight.float().t()
        with torch.no_grad():
            soft = teacher.float() @ teacher_weight.float().t()
        return _divergences(logits, soft, case).sum()

    def loss(problem: Problem) -> Tensor:
        parts = zip(problem.student.split(TRL_ROWS), problem.teacher.split(TRL_ROWS), strict=True)
        total = problem.student.new_zeros((), dtype=torch.float32)
        for student, teacher in parts:
            total = total + checkpoint(
                chunk, student, problem.student_weight, teacher, problem.teacher_weight,
                use_reentrant=False,
            )  # fmt: skip
        return total / len(problem.student)

    return loss


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _student_logits(problem: Problem) -> Tensor:
    return _widened(F.linear(problem.student, problem.student_weight))


@torch.no_grad()
def _teacher_logits(problem: Problem) -> Tensor:
    return _widened(F.linear(problem.teacher, problem.teacher_weight))


def _linear_kd(problem: Problem) -> Tensor:
    return _kd(_student_logits(problem), _teacher_logits(problem), problem.labels, problem.case)


def _from_logits(problem: Problem) -> Tensor:
    return _kd(_widened(problem.student), _widened(problem.teacher), problem.labels, problem.case)


def _kd(student: Tensor, teacher: Tensor, labels: Tensor, case: Case) -> Tensor:
    value = _divergences(student, teacher, case).mean()
    return value + case.ce_weight * F.cross_entropy(student, labels) if case.ce_weight else value


def _divergences(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
    """The weighted sum of the case's divergences per row, [N]."""
    log_q = F.log_softmax(student / case.temperature, dim=-1)
    log_p = F.log_softmax(teacher / case.temperature, dim=-1)
    values = [weight * _divergence(name, log_p, log_q) for name, weight in case.mixture]
    return torch.stack(values).sum(0)


def _divergence(name: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Per row; p is the teacher, q the student."""
    if name == "forward_kl":
        return _kl(log_p, log_q)
    if name == "reverse_kl":
        return _kl(log_q, log_p)
    if name == "jsd":
        log_m = _log_mix(log_p, log_q, BETA)
        return BETA * _kl(log_p, log_m) + (1 - BETA) * _kl(log_q, log_m)
    if name == "skew_kl":
        return _kl(log_p, _log_mix(log_p, log_q, SKEW))
    if name == "skew_rkl":
        return _kl(log_q, _log_mix(log_q, log_p, SKEW))
    if name == "tvd":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    raise ValueError(f"unknown divergence {name!r}")


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def _log_mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), as TRL's generalized_jsd_loss forms it."""
    return torch.logsumexp(
        torch.stack([log_a + math.log(share), log_b + math.log1p(-share)]), dim=0
    )


def _linear_ce(problem: Problem) -> Tensor:
    return F.cross_entropy(_student_logits(problem), problem.labels)


def _linear_stats(problem: Problem) -> Tensor:
    """Divergence, cross-entropy, the teacher's entropy and top-1 agreement, added up."""
    student, teacher = _student_logits(problem), _teacher_logits(problem)
    log_q, log_p = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    kl = _kl(log_p, log_q).mean()
    ce = F.cross_entropy(student, problem.labels)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    agreement = (student.argmax(-1) == teacher.argmax(-1)).float().mean()
    return kl + ce + entropy + agreement


def _topk(problem: Problem) -> Tensor:
    """KL from the teacher's probabilities, normalised over its k ids, to the student's."""
    log_q = F.log_softmax(_student_logits(problem) / problem.case.temperature, dim=-1)
    log_p = F.log_softmax(_widened(problem.topk_logprobs) / problem.case.temperature, dim=-1)
    return _kl(log_p, log_q.gather(1, problem.topk_ids)).mean()


def _hidden_mse(problem: Problem) -> Tensor:
    return F.mse_loss(
        _widened(F.linear(problem.student, problem.student_weight)), _widened(problem.teacher)
    )


def _hidden_cosine(problem: Problem) -> Tensor:
    projected = _widened(F.linear(problem.student, problem.student_weight))
    return (1 - F.cosine_similarity(projected, _widened(problem.teacher), dim=-1)).mean()


def _relation(problem: Problem) -> Tensor:
    """MiniLM v2 (Wang et al. 2021, equations 2 to 4): mean over heads and query rows."""
    log_q = _log_relation(problem.student, problem.case.heads)
    with torch.no_grad():
        log_p = _log_relation(problem.teacher, problem.case.heads)
    return _kl(log_p, log_q).mean()


def _log_relation(states: Tensor, heads: int) -> Tensor:
    """[B, L, D] -> [B, heads, L, L]."""
    batch, length, width = states.shape
    split = states.view(batch, length, heads, width // heads).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    return F.log_softmax(_widened(scores), dim=-1)


_LOSSES = {
    "linear_kd": _linear_kd,
    "linear_ce": _linear_ce,
    "linear_stats": _linear_stats,
    "topk": _topk,
    "logits": _from_logits,
    "rows": _from_logits,
    "hidden_mse": _hidden_mse,
    "hidden_cosine": _hidden_cosine,
    "relation": _relation,
}
