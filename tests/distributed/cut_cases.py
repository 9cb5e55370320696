"""Cut models on gloo ranks: loaded from a folder, trained for a few SGD steps."""

from __future__ import annotations

import torch
from cases import sgd_engine
from tiny_cuts import VOCABULARY, loaded, source_of, task

from megakd.engine import distributed
from megakd.engine.sharding import gathered_state
from megakd.models.loading import load_model

STEPS, RATE = 2, 0.3
# Rows of all ranks.
TOKENS = torch.arange(2, 50).reshape(4, 12)


def loss_of(model, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens).logits
    return (logits * torch.linspace(-1, 1, logits[0].numel()).view(logits[0].shape)).mean()


def reference(folder, kind: str) -> dict[str, torch.Tensor]:
    """Train in one process, on the rows of all ranks."""
    model = loaded(folder, kind)
    for _ in range(STEPS):
        model.zero_grad()
        loss_of(model, TOKENS).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(RATE * parameter.grad)
    return {name: value.detach() for name, value in model.state_dict().items()}


def train(folder: str, kind: str, stage: int) -> dict:
    """Weights after a few steps, and whether any parameter had no gradient."""
    model = load_model(
        source_of(folder, kind),
        task=task(kind),
        label_names=("no", "yes", "perhaps") if kind == "classification" else (),
        tokenizer_size=VOCABULARY,
        ds={"zero_optimization": {"stage": stage}},
        dtype=torch.float32,
        seed=1,
        need_head=True,
    )
    model.eval()  # no dropout
    engine = sgd_engine(model, RATE, stage)
    ranks = distributed.ranks()
    tokens = TOKENS.chunk(ranks.world_size)[ranks.rank]
    for _ in range(STEPS):
        engine.backward(loss_of(engine, tokens))
        engine.step()
    weights = dict(gathered_state(engine.module))
    engine.destroy()
    return weights
