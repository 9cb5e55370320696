"""Errors of a method are found before the first stage, as are damaged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoiling import LATE, Bench, assert_refused
from tiny_runs import bert

from megakd.engine import sharding

WEIGHTS = "model.safetensors"


@pytest.fixture
def bench(whole_run, tmp_path, one_rank) -> Bench:
    return Bench(tmp_path, whole_run.reviews, whole_run.teacher, one_rank)


SELECTION = {"name": "knowledge_selection", "episodes": 1}


KL = {"objective": [{"loss": "soft_target_kl"}], "student": {"model": bert(2)}}
EPOCH = {"per_device_train_batch_size": 8, "max_steps": None, "num_train_epochs": 1}


@pytest.mark.parametrize(
    ("sections", "fragment"),
    [
        (
            {"method": SELECTION, "student": {"model": bert(1)}},
            "layer_mapping uniform maps the only layer that the student has",
        ),
        # As many steps as the rows give.
        (
            {**KL, "method": {**SELECTION, "phase_steps": 17}, "train": EPOCH},
            "a phase of 17 steps does not fit into an episode of 8",
        ),
        (
            {
                "method": {"name": "minidisc", "metric": "matthews"},
                "student": {"model": "from_teacher"},
            },
            "method.metric",
        ),
    ],
    ids=["one layer", "phase of an epoch", "metric"],
)
def test_a_method_refuses_before_its_teacher_is_trained(bench, sections, fragment):
    assert_refused(bench.start(bench.tree(teacher=LATE, **sections)), bench, fragment)


def poison(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def test_weights_that_are_not_finite_are_blamed_in_place_of_the_learning_rate(bench):
    folder = bench.copied()
    poison(folder)

    outcome = bench.start(bench.tree(teacher={"model": str(folder)}))

    assert outcome.code == 2
    assert f"teacher.model: 1 weight tensors of {folder} are not finite" in outcome.err
    assert "query.weight" in outcome.err
    assert "learning_rate" not in outcome.err


@pytest.mark.parametrize(
    ("bad", "dtype"), [(torch.nan, torch.bfloat16), (-torch.inf, torch.float32)]
)
def test_one_bad_number_is_found_whatever_the_dtype(bad, dtype, monkeypatch):
    monkeypatch.setattr(sharding, "gather", lambda value: [value])
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)

    assert sharding.names_of_bad_weights(model) == []
    with torch.no_grad():
        model[1].weight[1, 2] = bad
    assert sharding.names_of_bad_weights(model) == ["1.weight"]


def test_the_padding_of_a_shard_does_not_count(monkeypatch):
    shard = torch.tensor([1.0, 2.0, torch.nan])
    shard.status = type("Status", (), {"name": "AVAILABLE"})
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor, parameter.ds_numel, parameter.ds_process_group = shard, 5, None
    monkeypatch.setattr(sharding, "is_zero_param", lambda _: True)

    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 1)
    assert sharding._own_part(parameter).tolist() == [1.0, 2.0]
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _: 2)
    assert sharding._own_part(parameter).tolist() == []
