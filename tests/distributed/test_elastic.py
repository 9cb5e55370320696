"""Cut models, and several views in one backward, train on two ranks as dense models do."""

from __future__ import annotations

import functools

import cut_cases
import elastic_cases
import pytest
import residual_cases
import torch
from elastic_views import EVERYTHING, NARROW, NOTHING, WITHOUT
from equal_runs import difference
from tiny_cuts import build, cut, saved, task_of, view_of

VIEWS = (WITHOUT, NARROW, NOTHING, EVERYTHING)


@functools.cache
def expected(family: str) -> dict:
    return elastic_cases.reference(family, VIEWS)


@pytest.mark.parametrize(
    ("stage", "family", "options"),
    [
        (0, "bert", {"shares": True}),
        (1, "bert", {"late": True}),
        (2, "bert", {"shares": True, "recomputes": True}),
        (3, "bert", {"shares": True, "late": True}),
        (3, "bert", {"recomputes": True}),
        (3, "llama", {"shares": True}),
        pytest.param(3, "bert", {}, marks=pytest.mark.slow),
        pytest.param(3, "gpt2", {"shares": True}, marks=pytest.mark.slow),
        pytest.param(3, "enct5", {"shares": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_train_all_views_as_dense_models_would_be(workers, stage, family, options):
    found = workers(2).run("elastic_cases.train", family, VIEWS, stage, options)[0]

    start = dict(elastic_cases.prepared(family).named_parameters())
    assert difference(start, expected(family)) > 1e-3
    assert difference(found["weights"], expected(family)) <= 1e-6
    assert found["invalidations"] == 0
    if stage == 3:
        assert found["seen"] > 0
        assert found["held"] == 0


@pytest.mark.parametrize(
    ("family", "task", "stage"),
    [
        ("bert", "mlm", 3),  # its head is the embedding
        pytest.param("bert", "mlm", 0, marks=pytest.mark.slow),
        pytest.param("bert", "mlm", 2, marks=pytest.mark.slow),
        pytest.param("llama", "causal_lm", 3, marks=pytest.mark.slow),
    ],
)
def test_a_step_of_all_views_is_that_of_dense_narrower_models(workers, family, task, stage):
    found = workers(2).run("residual_cases.train", family, task, stage)

    expected = residual_cases.reference(family, task)
    start = dict(residual_cases.prepared(family, task).named_parameters())
    weights = found[0]["weights"]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(weights[name], value, atol=2e-6, rtol=1e-5, msg=name)
    moved = {name for name in start if not torch.equal(start[name], weights[name])}
    assert any("embed" in name for name in moved)
    for name, score in expected["scores"].items():
        assert sum(rank["scores"][name] for rank in found) == pytest.approx(score, rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "family"),
    # 3: parameters without elements could not be gathered; the other families work as these do.
    [
        (2, "bert"),
        pytest.param(3, "bert", marks=pytest.mark.slow),
        pytest.param(3, "qwen3", marks=pytest.mark.slow),
        (3, "gpt2"),
        pytest.param(3, "enct5", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks_train_a_cut_model_as_one_process_does(workers, tmp_path, stage, family):
    kind, model = task_of(family), build(family)
    folder = saved(cut(model, kind, view_of(model, "empty")), tmp_path / "cut")

    found = workers(2).run("cut_cases.train", str(folder), kind, stage)[0]

    expected = cut_cases.reference(folder, kind)
    before = cut_cases.loaded(folder, kind).state_dict()
    trained = {name: value for name, value in found.items() if value.numel()}
    assert max((before[name] - value).abs().max().item() for name, value in trained.items()) > 1e-3
    for name, value in trained.items():
        assert (value - expected[name]).abs().max().item() <= 1e-5, name
