"""Distillation in one process and plain PyTorch, written without any of megakd's losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def train(student, teacher, projections, steps, settings) -> dict:
    """AdamW steps over whole batches; gradients before clipping and the final weights.

    projections: parameter name -> (term, pair index, weight); trained beside the student.
    steps: a batch of all ranks' rows per step.
    """
    weights = {name: nn.Parameter(value.clone()) for name, value in projections.items()}
    named = {f"student.{name}": p for name, p in student.named_parameters()} | weights
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=settings["learning_rate"],
        eps=settings["adam_epsilon"],
    )
    gradients, losses = [], []
    for step, batch in enumerate(steps):
        optimizer.zero_grad()
        terms = step_terms(student, teacher, list(weights.values()), batch, settings)
        sum(settings["weights"][name] * value for name, value in terms.items()).backward()
        gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        losses.append({name: float(value.detach()) for name, value in terms.items()})
        rate = settings["learning_rate"] * (1 - step / settings["total_steps"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(named.values(), settings["max_grad_norm"])
        optimizer.step()
    final = {name: p.detach().clone() for name, p in named.items()}
    return {"gradients": gradients, "losses": losses, "final": final}


def step_terms(student, teacher, projections, batch, settings) -> dict:
    """Every term's mean over its own unit, over the whole step."""
    is_language = batch.labels.dim() == 2
    extra = {"use_cache": False} if is_language else {}
    said = student(**batch.inputs, output_hidden_states=True, **extra)
    with torch.no_grad():
        taught = teacher(**batch.inputs, output_hidden_states=True, **extra)
    counted = batch.labels != -100 if is_language else batch.valid.any(1)
    student_logits, teacher_logits = said.logits[counted], taught.logits[counted]
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    labelled = batch.labels != -100
    terms = {}
    for name, weight in settings["weights"].items():
        if name == "hard_cross_entropy":
            terms[name] = F.cross_entropy(said.logits[labelled], batch.labels[labelled])
        elif name.startswith("soft_target"):
            terms[name] = _soft(
                name, student_logits[:, :shared], teacher_logits[:, :shared], settings
            )
        else:
            terms[name] = _hidden(
                name, said.hidden_states, taught.hidden_states, projections, batch, settings
            )
        assert weight > 0
    return terms


def _soft(name, student_logits, teacher_logits, settings):
    temperature = settings["temperature"]
    p = F.softmax(teacher_logits / temperature, -1)
    q = F.softmax(student_logits / temperature, -1)
    if name == "soft_target_kl":
        rows = (p * (p.log() - q.log())).sum(-1)
    elif name == "soft_target_reverse_kl":
        rows = (q * (q.log() - p.log())).sum(-1)
    else:
        m = 0.5 * (p + q)
        rows = 0.5 * (p * (p.log() - m.log())).sum(-1) + 0.5 * (q * (q.log() - m.log())).sum(-1)
    return rows.mean() * temperature**2


def _hidden(name, student, teacher, projections, batch, settings):
    layers = []
    for index, (s, t) in enumerate(settings["pairs"]):
        projected = student[s] @ projections[settings["offset"][name] + index].T
        ours, theirs = projected[batch.valid], teacher[t][batch.valid]
        if name == "hidden_mse":
            layers.append((ours - theirs).square().mean())
        else:
            layers.append((1 - F.cosine_similarity(ours, theirs, dim=-1)).mean())
    return torch.stack(layers).mean()
