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
    named = {f"learners.0.{name}": p for name, p in student.named_parameters()} | weights
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
    extra = {"use_cache": False} if "position_ids" in batch.inputs else {}
    extra["output_attentions"] = "attention_mse" in settings["weights"]
    answer = student(**batch.inputs, output_hidden_states=True, **extra)
    with torch.no_grad():
        taught = teacher(**batch.inputs, output_hidden_states=True, **extra)
    both = ((student, answer), (teacher, taught))
    counted = batch.labels != -100 if is_language else batch.valid.any(1)
    student_logits, teacher_logits = answer.logits[counted], taught.logits[counted]
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    labelled = batch.labels != -100
    terms = {}
    for name in settings["weights"]:
        if name == "hard_cross_entropy":
            terms[name] = F.cross_entropy(answer.logits[labelled], batch.labels[labelled])
        elif name.startswith("soft_target"):
            terms[name] = _soft(
                name, student_logits[:, :shared], teacher_logits[:, :shared], settings
            )
        elif name == "attention_mse":
            terms[name] = _attention(answer.attentions, taught.attentions, batch, settings)
        elif name == "relation_kl":
            terms[name] = _relations(both, batch, settings)
        else:
            terms[name] = _hidden(
                name, answer.hidden_states, taught.hidden_states, projections, batch, settings
            )
    return terms


def _soft(name, student_logits, teacher_logits, settings):
    temperature = settings["temperature"]
    p = F.softmax(teacher_logits / temperature, -1)
    q = F.softmax(student_logits / temperature, -1)
    if name == "soft_target_kl":
        rows = (p * (p.log() - q.log())).sum(-1)
    else:
        rows = (q * (q.log() - p.log())).sum(-1)
    return rows.mean() * temperature**2


def _hidden(name, student, teacher, projections, batch, settings):
    layers = []
    pairs = ((0, 0),) if name == "embedding_mse" else settings["pairs"]
    for index, (s, t) in enumerate(pairs):
        projected = student[s] @ projections[settings["offset"][name] + index].T
        ours, theirs = projected[batch.valid], teacher[t][batch.valid]
        if name.endswith("_mse"):
            layers.append((ours - theirs).square().mean())
        else:
            layers.append((1 - F.cosine_similarity(ours, theirs, dim=-1)).mean())
    return torch.stack(layers).mean()


def _attention(student, teacher, batch, settings):
    """Return the loss of the probabilities that eager attention returns."""
    keys = seen_keys(batch).sum(-1)  # [B, T]
    layers = [
        ((student[s - 1] - teacher[t - 1]).square().sum(-1).mean(1) / keys)[batch.valid].mean()
        for s, t in settings["pairs"]
    ]
    return torch.stack(layers).mean()


def seen_keys(batch):
    """[B, T, T]: as many tokens as the position says, the query's own included, if causal."""
    positions = batch.inputs.get("position_ids")
    if positions is None:
        return batch.valid[:, None, :].expand(-1, batch.valid.shape[1], -1)
    index = torch.arange(positions.shape[1])
    first = index[:, None] - positions[:, :, None]
    return (first <= index) & (index <= index[:, None])


def _relations(both, batch, settings):
    values = []
    for layers in settings["pairs"]:
        ours, theirs = (
            relations(model, answer.hidden_states[layer - 1], layer - 1, batch, settings)
            for (model, answer), layer in zip(both, layers, strict=True)
        )
        for log_q, log_p in zip(ours, theirs, strict=True):
            rows = (log_p.detach().exp() * (log_p.detach() - log_q)).sum(-1).mean(1)
            values.append(rows[batch.valid].mean())
    return torch.stack(values).mean()


def relations(model, states, layer, batch, settings):
    """log relations [B, heads, T, T] of queries, keys, values, and of queries with keys."""
    queries, keys, values = layer_vectors(model, states, layer, batch)
    repeated = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    unseen = ~seen_keys(batch)[:, None]
    pairs = ((queries, queries), (keys, keys), (values, values), (queries, repeated))
    for pair in pairs:
        x, y = (part.transpose(1, 2).flatten(2) for part in pair)
        x, y = (part.unflatten(-1, (settings["heads"], -1)).transpose(1, 2) for part in (x, y))
        scores = x @ y.mT / x.shape[-1] ** 0.5
        yield scores.masked_fill(unseen, -1e9).log_softmax(-1)


def layer_vectors(model, states, layer, batch):
    """[B, heads, T, width], from what goes into the layer, by the layer's own parts."""
    if hasattr(model, "bert"):
        part = model.bert.encoder.layer[layer].attention.self
        made = (part.query(states), part.key(states), part.value(states))
        width = part.attention_head_size
        return [x.unflatten(-1, (-1, width)).transpose(1, 2) for x in made]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    block = model.model.layers[layer]
    part, states = block.self_attn, block.input_layernorm(states)
    made = (part.q_proj(states), part.k_proj(states), part.v_proj(states))
    queries, keys, values = (x.unflatten(-1, (-1, part.head_dim)).transpose(1, 2) for x in made)
    turns = model.model.rotary_emb(states, batch.inputs["position_ids"])
    return [*apply_rotary_pos_emb(queries, keys, *turns), values]
