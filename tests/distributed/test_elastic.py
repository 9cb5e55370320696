"""Several views in one backward, and cut models, train on two ranks as on one."""

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
from slow_cases import slow
from tiny_cuts import VOCABULARY, build, cut, loaded, saved, source_of, task_of, view_of
from tiny_cuts import task as task_config
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from megakd.engine import distributed
from megakd.engine.sharding import gathered_state
from megakd.models.elastic import Elastic
from megakd.models.loading import load_model
from megakd.models.views import View

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
    """Weights after a few steps; at ZeRO 3 none is alive between the last forward and backward.

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
        held = _still_held(gathered)
        engine.backward(loss)
        engine.step()
    assert invalidations == []
    assert stage < 3 or (len(gathered) > 0 and held == 0), held
    weights = dict(gathered_state(model))
    engine.destroy()
    return weights


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


SHARES, LATE, RECOMPUTES = {"shares": True}, {"late": True}, {"recomputes": True}
CASES = [(3, "llama", None, SHARES)]
SLOW = [(1, "bert", None, LATE), (0, "bert", None, SHARES), (2, "bert", None, SHARES | RECOMPUTES)]
SLOW += [(3, "bert", None, SHARES | LATE), (3, "bert", None, RECOMPUTES), (3, "bert", "mlm", {})]
SLOW += [(3, "gpt2", None, SHARES), (3, "enct5", None, SHARES)]


@pytest.mark.parametrize(("stage", "family", "task", "options"), [*CASES, *slow(*SLOW)])
def test_two_ranks_train_all_views_as_one_does(workers, stage, family, task, options):
    """A view in one process is compared with dense models in tests/models."""
    both = workers(2).run("test_elastic.train", family, task, stage, options)[0]

    alone = workers(1).run("test_elastic.train", family, task, 0, {})[0]
    start = dict(prepared(family, task).named_parameters())
    assert difference(start, alone) > 1e-3
    assert difference(both, alone) <= 1e-6


def train_cut(folder: str, kind: str, stage: int) -> dict:
    model = load_model(
        source_of(folder, kind),
        task=task_config(kind),
        label_names=("no", "yes", "perhaps") if kind == "classification" else (),
        tokenizer_size=VOCABULARY,
        ds={"zero_optimization": {"stage": stage}},
        dtype=torch.float32,
        seed=1,
        need_head=True,
    )
    model.eval()  # no dropout
    engine = sgd_engine(model, RATE, stage)
    tokens = GLOBAL.chunk(distributed.ranks().world_size)[distributed.ranks().rank]
    for _ in range(STEPS):
        logits = engine(input_ids=tokens).logits
        scale = torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape)
        engine.backward((logits * scale).mean())
        engine.step()
    weights = dict(gathered_state(engine.module))
    engine.destroy()
    return weights


@pytest.mark.parametrize(
    ("stage", "family"),
    [
        (3, "gpt2"),  # parameters without elements could not be gathered
        *slow((2, "bert"), (3, "qwen3"), (3, "enct5")),
    ],
)
def test_two_ranks_train_a_cut_model_as_one_does(workers, tmp_path, stage, family):
    kind, model = task_of(family), build(family)
    folder = saved(cut(model, kind, view_of(model, "empty")), tmp_path / "cut")

    actual, expected = (
        workers(ranks).run("test_elastic.train_cut", str(folder), kind, zero)[0]
        for ranks, zero in ((2, stage), (1, 0))
    )

    before = loaded(folder, kind).state_dict()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    trained = {name: value for name, value in actual.items() if value.numel()}
    assert difference(trained, {name: before[name] for name in trained}) > 1e-3
