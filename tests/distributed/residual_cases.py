"""Narrower views of a language model on gloo ranks: one step over all views, and scores."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from cases import sgd_engine
from elastic_views import TOKENS, VOCABULARY, cut, family_model, gradients_of, without_dropout
from unit_counts import counts_of

from megakd.contract.batch import IGNORE, Batch
from megakd.contract.stage import Pass
from megakd.contract.terms import HardCrossEntropy, SoftTargetKl
from megakd.contract.views import Shape, View
from megakd.engine import distributed
from megakd.engine.sharding import gathered_state
from megakd.losses.bundle import StudentBundle
from megakd.losses.objective import build_objective
from megakd.models.axes import narrowed, weight_axes
from megakd.models.knowledge import Needs, read_knowledge

VIEWS = {
    "whole": View((3, 3, 3), (40, 40, 40)),
    "half": View((3, 1, 2), (7, 40, 33), 17),
    "few": View((1, 1, 1), (5, 12, 3), 8),
}
TERMS = (
    HardCrossEntropy(loss="hard_cross_entropy", weight=0.25),
    SoftTargetKl(loss="soft_target_kl", weight=0.75),
)
RATE = 0.5
# Rows of all ranks; every third token has a label.
ROWS = torch.cat([TOKENS, TOKENS.flip(0) + 31])
LABELS = torch.where(ROWS % 3 == 0, (ROWS * 7) % VOCABULARY, IGNORE)


def prepared(family: str, task: str):
    return without_dropout(family_model(family, task)).float()


def reference(family: str, task: str) -> dict:
    """Run in one process: every view is a dense model that was cut to it."""
    model = prepared(family, task)
    teacher = copy.deepcopy(model)
    gradients = {id(parameter): torch.zeros_like(parameter) for parameter in model.parameters()}
    axes, scores = weight_axes(model), {}
    labelled = LABELS != IGNORE
    with torch.no_grad():
        wanted = teacher(input_ids=ROWS).logits[labelled].softmax(-1)
    for name, view in VIEWS.items():
        dense = cut(model, view)
        said = dense(input_ids=ROWS).logits[labelled]
        hard = F.cross_entropy(said, LABELS[labelled])
        soft = F.kl_div(said.log_softmax(-1), wanted, reduction="batchmean")
        ((0.25 * hard + 0.75 * soft) / len(VIEWS)).backward()
        scores[name] = hard.item() * labelled.sum().item()
        for path, gradient in gradients_of(dense).items():
            parameter = model.get_parameter(path)  # tied ones are two in a cut model
            numbers = torch.arange(parameter.numel()).view(parameter.shape)
            kept = narrowed(numbers, axes.get(path, ()), view).flatten()
            gradients[id(parameter)].view(-1)[kept] += gradient.flatten()
    weights = {n: (p - RATE * gradients[id(p)]).detach() for n, p in model.named_parameters()}
    return {"weights": weights, "scores": scores}


def train(family: str, task: str, stage: int) -> dict:
    """Weights after one step, and before it the cross-entropy of every view on this rank."""
    model, ranks = prepared(family, task), distributed.ranks()
    teacher = copy.deepcopy(model).requires_grad_(requires_grad=False)
    ids, labels = (part.chunk(ranks.world_size)[ranks.rank] for part in (ROWS, LABELS))
    batch = Batch({"input_ids": ids}, labels, torch.ones_like(ids, dtype=torch.bool))
    shape = Shape(3, 24, VOCABULARY)
    objective = build_objective(TERMS, task, shape, shape)
    bundle = StudentBundle({"student": model}, objective, world_size=ranks.world_size, views=VIEWS)
    engine = sgd_engine(bundle, RATE, stage)
    with torch.no_grad():
        knowledge = {"teacher": read_knowledge(teacher, batch, Needs())}
        engine.eval()
        scores = {name: engine(batch, view=name).sums[0].item() for name in VIEWS}
    engine.train()
    plan = [Pass(teacher="teacher", view=name, scale=1 / len(VIEWS)) for name in VIEWS]
    counts = counts_of(len(ROWS), int((LABELS != IGNORE).sum()), ROWS.numel())
    engine.backward(engine(batch, knowledge, plan, counts).total)
    engine.step()
    weights = dict(gathered_state(model))
    engine.destroy()
    return {"weights": weights, "scores": scores}
