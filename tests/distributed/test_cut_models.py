"""Cut models train on two ranks as in one process."""

from __future__ import annotations

import pytest
import torch
from cases import sgd_engine
from tiny_cuts import VOCABULARY, build, cut, loaded, saved, source_of, task, task_of, view_of

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
    model = loaded(folder, kind)
    for _ in range(STEPS):
        model.zero_grad()
        loss_of(model, TOKENS).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(RATE * parameter.grad)
    return {name: value.detach() for name, value in model.state_dict().items()}


def train(folder: str, kind: str, stage: int) -> dict:
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


@pytest.mark.parametrize(
    ("stage", "family"),
    # 3: parameters without elements could not be gathered.
    [
        (2, "bert"),
        pytest.param(3, "qwen3", marks=pytest.mark.slow),
        (3, "gpt2"),
        pytest.param(3, "enct5", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_train_a_cut_model_as_one_process_does(workers, tmp_path, stage, family):
    kind, model = task_of(family), build(family)
    folder = saved(cut(model, kind, view_of(model, "empty")), tmp_path / "cut")

    actual = workers(2).run("test_cut_models.train", str(folder), kind, stage)[0]

    expected = reference(folder, kind)
    before = loaded(folder, kind).state_dict()
    trained = {name: value for name, value in actual.items() if value.numel()}
    assert max((before[name] - value).abs().max().item() for name, value in trained.items()) > 1e-3
    for name, value in trained.items():
        assert (value - expected[name]).abs().max().item() <= 1e-5, name
