"""A finished run that is started again with more steps goes on where it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from spoiling import Bench
from tiny_runs import bert

CONSTANT = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 4}


@pytest.fixture
def bench(whole_run, tmp_path, one_rank) -> Bench:
    return Bench(tmp_path, whole_run.reviews, whole_run.teacher, one_rank)


def tree(bench: Bench, out: str, **train: Any) -> dict[str, Any]:
    made = bench.tree(train={**CONSTANT, "max_steps": None, **train})
    save = {"save_steps": 1, "save_total_limit": 2}
    return {**made, "output_dir": str(bench.folder / out), "save": save}


def steps_saved(bench: Bench, stage: str) -> list[str]:
    folder = bench.folder / "out" / "checkpoints" / stage
    return sorted(path.name for path in folder.glob("step-*"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


@pytest.mark.parametrize("longer", [{"max_steps": 6}, {"num_train_epochs": 0.375}])
def test_a_longer_run_has_the_weights_of_one_that_was_as_long_from_the_start(bench, longer):
    bench.start(tree(bench, "whole", max_steps=6))
    shorter = {"max_steps": 3} if "max_steps" in longer else {"num_train_epochs": 0.1875}
    assert bench.start(tree(bench, "out", **shorter)).code == 0
    assert steps_saved(bench, "student") == ["step-3"]

    said = bench.start(tree(bench, "out", **longer))

    assert said.code == 0, said.err
    (key, steps) = next(iter(longer.items()))
    assert "student: finished with 3 steps and continues" in said.err
    assert f"train.{key}: {shorter[key]} there, {steps} here" in said.err
    report = json.loads((bench.folder / "out" / "report.json").read_text())
    assert [stage["steps"] for stage in report["stages"]] == [6]
    whole, found = weights(bench.folder / "whole"), weights(bench.folder / "out")
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_baseline_goes_on_too(bench):
    both = {"baselines": ["alone"]}
    bench.start({**tree(bench, "out", max_steps=2), **both})

    said = bench.start({**tree(bench, "out", max_steps=4), **both})

    assert said.code == 0, said.err
    report = json.loads((bench.folder / "out" / "report.json").read_text())
    assert {stage["name"]: stage["steps"] for stage in report["stages"]} == {
        "student": 4,
        "alone": 4,
    }


def test_fewer_steps_than_a_finished_run_took_are_refused_and_change_nothing(bench):
    bench.start(tree(bench, "out", max_steps=4))
    before = weights(bench.folder / "out")

    said = bench.start(tree(bench, "out", max_steps=3))

    assert said.code == 2
    assert "train.max_steps: 4 there, 3 here" in said.err
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in weights(bench.folder / "out").items()
    )


def test_a_stage_that_others_were_made_from_does_not_go_on(bench):
    teacher = {"teacher": {"model": bert(2), "finetune": {}}}
    bench.start({**tree(bench, "out", max_steps=2), **teacher})
    # No start reads its checkpoints again: its model is in stages/.
    assert not (bench.folder / "out" / "checkpoints" / "teacher-finetune").exists()

    said = bench.start({**tree(bench, "out", max_steps=4), **teacher})

    assert said.code == 2
    assert "teacher-finetune" in said.err
    assert "train.max_steps: 2 there, 4 here" in said.err


def test_another_change_beside_more_steps_is_refused(bench):
    bench.start(tree(bench, "out", max_steps=2))

    said = bench.start(tree(bench, "out", max_steps=4, learning_rate=0.5))

    assert said.code == 2
    assert "train.learning_rate" in said.err
