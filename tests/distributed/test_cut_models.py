"""Cut models train on two ranks as on one."""

from __future__ import annotations

import pytest
import torch
from cases import sgd_engine
from equal_runs import difference
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
def test_two_ranks_train_a_cut_model_as_one_does(workers, tmp_path, stage, family):
    kind, model = task_of(family), build(family)
    folder = saved(cut(model, kind, view_of(model, "empty")), tmp_path / "cut")

    actual = workers(2).run("test_cut_models.train", str(folder), kind, stage)[0]

    expected = workers(1).run("test_cut_models.train", str(folder), kind, 0)[0]
    before = loaded(folder, kind).state_dict()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    trained = {name: value for name, value in actual.items() if value.numel()}
    assert difference(trained, {name: before[name] for name in trained}) > 1e-3
