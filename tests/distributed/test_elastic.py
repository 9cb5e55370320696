"""Several views in one backward train on two ranks as on one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from cases import sgd_engine
from elastic_views import (
    EVERYTHING,
    NARROW,
    NOTHING,
    TOKENS,
    WITHOUT,
    family_model,
    loss_of,
    view_for,
    without_dropout,
)
from equal_runs import difference
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from megakd.contract.views import View
from megakd.engine import distributed
from megakd.engine.sharding import gathered_state
from megakd.models.elastic import Elastic

STEPS, RATE = 2, 0.5
VIEWS = (WITHOUT, NARROW, NOTHING, EVERYTHING)
# Rows of all ranks.
GLOBAL = torch.cat([TOKENS, TOKENS.flip(0) + 31])


class AllViews(nn.Module):
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


def prepared(family: str, task: str | None):
    """Return a model; the embedding of one with a named task is its head, too."""
    tied = {} if task else {"tie_word_embeddings": False}
    return without_dropout(family_model(family, task, **tied)).float()


def train(family: str, task: str | None, stage: int, options: dict) -> dict:
    """Weights after a few steps; of the last step what was alive between forward and backward.

    options: `shares` the embeddings, `late`: elastic only after DeepSpeed has the model,
    `recomputes` activations in the backward.
    """
    model = prepared(family, task)
    if options.get("recomputes"):
        # The other kind reduces gradients once per view, which DeepSpeed takes for a mistake.
        model.activation_checkpointing_enable({"use_reentrant": False})
    bundle = AllViews(
        model, [view_for(model, view) for view in VIEWS], shares=options.get("shares", False)
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
    collected: list[StorageWeakRef] = []

    def note(module: nn.Module, *_) -> None:
        weights = module.parameters(recurse=False)
        collected.extend(StorageWeakRef(weight.untyped_storage()) for weight in weights)

    for module in model.modules():
        # In front of DeepSpeed's, which lets go of the weights.
        module.register_forward_hook(note, prepend=True)
    return collected


def _still_held(weights: Sequence[StorageWeakRef]) -> int:
    """Count the live tensors, after gloo's thread has released the last, milliseconds later."""
    deadline = time.monotonic() + 1.0
    while not all(weight.expired() for weight in weights) and time.monotonic() < deadline:
        time.sleep(0.001)
    return sum(not weight.expired() for weight in weights)


def _count_invalidations(engine) -> list[int]:
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    collected: list[int] = []
    invalidate = coordinator._invalidate_trace

    def counting() -> None:
        collected.append(1)
        invalidate()

    coordinator._invalidate_trace = counting
    return collected


@pytest.mark.parametrize(
    ("stage", "family", "task", "options"),
    [
        (0, "bert", None, {"shares": True}),
        (1, "bert", None, {"late": True}),
        (2, "bert", None, {"shares": True, "recomputes": True}),
        (3, "bert", None, {"shares": True, "late": True}),
        (3, "bert", None, {"recomputes": True}),
        (3, "bert", "mlm", {}),
        (3, "llama", None, {"shares": True}),
        pytest.param(3, "gpt2", None, {"shares": True}, marks=pytest.mark.slow),
        pytest.param(3, "enct5", None, {"shares": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_train_all_views_as_one_does(workers, stage, family, task, options):
    """A view in one process is compared with dense models in tests/models."""
    result = workers(2).run("test_elastic.train", family, task, stage, options)[0]

    alone = workers(1).run("test_elastic.train", family, task, 0, {})[0]["weights"]
    start = dict(prepared(family, task).named_parameters())
    assert difference(start, alone) > 1e-3
    assert difference(result["weights"], alone) <= 1e-6
    assert result["invalidations"] == 0
    if stage == 3:
        assert result["seen"] > 0
        assert result["held"] == 0
