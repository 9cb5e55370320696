"""A finished run that is started again with more steps goes on where it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from spoiling import Bench
from tiny_runs import bert


def tree(bench: Bench, out: str, **train: Any) -> dict[str, Any]:
    constant = {"lr_scheduler_type": "constant", "max_steps": None}
    made = bench.tree(train={**constant, **train})
    save = {"save_steps": 1, "save_total_limit": 2}
    return {**made, "output_dir": str(bench.folder / out), "save": save}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def with_baseline(bench: Bench, out: str, **train: Any) -> dict[str, Any]:
    return {**tree(bench, out, **train), "baselines": ["alone"]}


def test_a_longer_run_has_the_weights_of_one_that_was_as_long_from_the_start(bench):
    shorter, longer = {"num_train_epochs": 0.1875}, {"num_train_epochs": 0.375}
    bench.start(with_baseline(bench, "whole", max_steps=6))
    assert bench.start(with_baseline(bench, "out", **shorter)).code == 0
    saved = (bench.folder / "out" / "checkpoints" / "student").glob("step-*")
    assert [path.name for path in saved] == ["step-3"]

    outcome = bench.start(with_baseline(bench, "out", **longer))

    assert outcome.code == 0, outcome.err
    (key, limit) = next(iter(longer.items()))
    assert "student: finished with 3 steps and continues" in outcome.err
    assert f"train.{key}: {shorter[key]} there, {limit} here" in outcome.err
    report = json.loads((bench.folder / "out" / "report.json").read_text())
    steps = {stage["name"]: stage["steps"] for stage in report["stages"]}
    assert steps == {"student": 6, "alone": 6}
    whole, result = weights(bench.folder / "whole"), weights(bench.folder / "out")
    assert all(torch.equal(result[name], whole[name]) for name in whole)


def test_fewer_steps_or_another_change_are_refused_and_change_nothing(bench):
    bench.start(tree(bench, "out", max_steps=3))
    before = weights(bench.folder / "out")

    for changes, message in (
        ({"max_steps": 2}, "train.max_steps: 3 there, 2 here"),
        ({"max_steps": 4, "learning_rate": 0.5}, "train.learning_rate"),
    ):
        outcome = bench.start(tree(bench, "out", **changes))
        assert outcome.code == 2
        assert message in outcome.err
        after = weights(bench.folder / "out")
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_a_stage_that_others_were_made_from_does_not_go_on(bench):
    teacher = {"teacher": {"model": bert(2), "finetune": {}}}
    bench.start({**tree(bench, "out", max_steps=2), **teacher})
    # No start reads its checkpoints again: its model is in stages/.
    assert not (bench.folder / "out" / "checkpoints" / "teacher-finetune").exists()

    outcome = bench.start({**tree(bench, "out", max_steps=4), **teacher})

    assert outcome.code == 2
    assert "teacher-finetune" in outcome.err
    assert "train.max_steps: 2 there, 4 here" in outcome.err
