"""Elastic models on gloo ranks: several views, one backward, a few SGD steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from cases import sgd_engine
from elastic_views import (
    TOKENS,
    cut,
    family_model,
    gradients_of,
    loss_of,
    masked,
    view_for,
    without_dropout,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from megakd.contract.views import View
from megakd.engine import distributed
from megakd.engine.sharding import gathered_state
from megakd.models.axes import narrowed, weight_axes
from megakd.models.elastic import Elastic

STEPS, RATE = 2, 0.5
# Rows of all ranks.
GLOBAL = torch.cat([TOKENS, TOKENS.flip(0) + 31])


class AllViews(nn.Module):
    """A model whose loss is the mean over its views."""

    def __init__(self, model: nn.Module, views: Sequence[View], *, shares: bool) -> None:
        super().__init__()
        self.model, self.views, self.shares = model, views, shares
        self.elastic: Elastic | None = None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        losses = []
        with self.elastic.sharing_embeddings() if self.shares else nullcontext():
            for view in self.views:
                with self.elastic.viewing(view):
                    losses.append(loss_of(self.model, tokens))
        return torch.stack(losses).mean()


def prepared(family: str):
    return without_dropout(family_model(family, tie_word_embeddings=False)).float()


def reference(family: str, views: Sequence[View]) -> dict[str, torch.Tensor]:
    """Train in one process dense models that are masked or cut at every step."""
    model = prepared(family)
    for _ in range(STEPS):
        gradients = [_dense_gradients(model, view_for(model, view)) for view in views]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.sub_(RATE * sum(found[name] for found in gradients) / len(views))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _dense_gradients(model: nn.Module, view: View) -> dict[str, torch.Tensor]:
    dense = masked(model, view) if view.width is None else cut(model, view)
    loss_of(dense, GLOBAL).backward()
    found, axes = gradients_of(dense), weight_axes(model)
    for name, parameter in model.named_parameters():
        whole = torch.zeros_like(parameter).flatten()
        numbers = torch.arange(len(whole)).view(parameter.shape)
        kept = narrowed(numbers, axes.get(name, ()), view) if view.width else numbers
        whole[kept.flatten()] = found[name].flatten()
        found[name] = whole.view(parameter.shape)
    return found


def train(family: str, views: Sequence[View], stage: int, options: dict) -> dict:
    """Weights after a few steps; of the last step what was alive between forward and backward.

    options: `shares` the embeddings, `late`: elastic only after DeepSpeed has the model,
    `recomputes` activations in the backward.
    """
    model = prepared(family)
    if options.get("recomputes"):
        # The other kind reduces gradients once per view, which DeepSpeed takes for a mistake.
        model.activation_checkpointing_enable({"use_reentrant": False})
    bundle = AllViews(
        model, [view_for(model, view) for view in views], shares=options.get("shares", False)
    )
    if not options.get("late"):
        bundle.elastic = Elastic(model)
    engine = sgd_engine(bundle, RATE, stage)
    engine.train()
    bundle.elastic = bundle.elastic or Elastic(model)
    gathered = _watch_weights(model)
    invalidations = _count_invalidations(engine) if stage == 3 else []
    tokens = GLOBAL.chunk(distributed.ranks().world_size)[distributed.ranks().rank]
    for step in range(STEPS):
        gathered.clear()
        if step == 1:
            invalidations.clear()
        loss = engine(tokens)
        held, seen = _still_held(gathered), len(gathered)
        engine.backward(loss)
        engine.step()
    weights = dict(gathered_state(model))
    engine.destroy()
    return {"weights": weights, "held": held, "seen": seen, "invalidations": len(invalidations)}


def _watch_weights(model: nn.Module) -> list[StorageWeakRef]:
    """The memory of every weight that a module has used, for as long as something holds it."""
    found: list[StorageWeakRef] = []

    def note(module: nn.Module, *_) -> None:
        weights = module.parameters(recurse=False)
        found.extend(StorageWeakRef(weight.untyped_storage()) for weight in weights)

    for module in model.modules():
        # In front of DeepSpeed's, which lets go of the weights.
        module.register_forward_hook(note, prepend=True)
    return found


def _still_held(weights: Sequence[StorageWeakRef]) -> int:
    """Count the live tensors, after gloo's thread has released the last, milliseconds later."""
    deadline = time.monotonic() + 1.0
    while not all(weight.expired() for weight in weights) and time.monotonic() < deadline:
        time.sleep(0.001)
    return sum(not weight.expired() for weight in weights)


def _count_invalidations(engine) -> list[int]:
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    found: list[int] = []
    invalidate = coordinator._invalidate_trace

    def counting() -> None:
        found.append(1)
        invalidate()

    coordinator._invalidate_trace = counting
    return found
