"""Toy methods of another package run through the real commands, on every seam that they use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_runs import bert, config_tree, write_config, write_reviews
from transformers import AutoModelForSequenceClassification

from megakd.errors import CheckpointError, ModelError
from megakd.storage.folders import check_given, open_finished

TASK = {"type": "classification"}


@pytest.fixture(scope="module", autouse=True)
def _toys(repository: Path, packages: Path) -> None:
    shutil.copy(repository / "tests" / "support" / "toy_methods.py", packages)


def config_of(folder: Path, **sections: Any) -> Path:
    task = {**TASK, "dataset": str(write_reviews(folder / "reviews"))}
    tree = config_tree(folder / "out", task, student={"model": bert(2)}, **sections)
    return write_config(folder / "run.yaml", tree)


def pruning(folder: Path, **sections: Any) -> Path:
    train = {"max_steps": 6, "per_device_train_batch_size": 4}
    return config_of(
        folder,
        teacher={"model": bert(2, 24)},
        method={"name": "toy_methods:Pruner"},
        train=train,
        log={"logging_steps": 1},
        **sections,
    )


def logged(out: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of what every stage has logged under a name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if name in record:
            found.setdefault(record["stage"], []).append((record["step"], record[name]))
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def pruned(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    said = one_rank.train("--config", pruning(folder))
    assert said.code == 0, said.err
    return folder / "out"


def test_a_method_prunes_by_the_sensitivity_of_shards_and_goes_on_with_the_cut_model(pruned):
    sizes = [
        json.loads((pruned / "stages" / f"window-{n}" / "config.json").read_text())
        for n in range(2)
    ]

    assert [size["intermediate_size"] for size in sizes] == [24, 16]
    model = AutoModelForSequenceClassification.from_pretrained(pruned / "final")
    assert model.config.intermediate_size == 16


def test_windows_continue_one_schedule_and_one_count_of_steps(pruned):
    rates = logged(pruned, "train/learning_rate")

    steps = [step for stage in ("window-0", "window-1") for step, _ in rates[stage]]
    assert steps == [1, 2, 3, 4, 5, 6]
    values = [rate for stage in ("window-0", "window-1") for _, rate in rates[stage]]
    # One linear decay over all six steps, whatever ends in between.
    assert values == pytest.approx([0.01 * (6 - step) / 6 for step in range(6)])
    report = json.loads((pruned / "report.json").read_text())
    taken = {stage["name"]: stage["steps"] for stage in report["stages"]}
    assert (taken["window-0"], taken["window-1"]) == (3, 3)


def test_a_window_that_was_stopped_goes_on_to_the_same_weights(one_rank, pruned, tmp_path):
    config = pruning(tmp_path, save={"save_steps": 1})

    stopped = one_rank.train("--config", config, stop_at=("window-1", 4))
    finished = one_rank.train("--config", config)

    assert stopped.code != 0
    assert finished.code == 0, finished.err
    assert "window-1: resumed at step 5" in finished.err
    assert_same_weights(tmp_path / "out" / "final", pruned / "final")


def test_what_is_kept_as_best_is_cut_as_its_verdict_said(one_rank, pruned, tmp_path):
    config = pruning(tmp_path, eval={"eval_steps": 1, "keep_best": True})

    said = one_rank.train("--config", config)

    assert said.code == 0, said.err
    # The judge scores every evaluation but the last of a window as NaN.
    best = json.loads((tmp_path / "out/checkpoints/window-1/best/best.json").read_text())
    assert best["step"] == 6
    assert_same_weights(tmp_path / "out" / "final", pruned / "final")


def test_a_method_of_windows_is_planned(one_rank, tmp_path):
    said = one_rank.megakd("plan", pruning(tmp_path))

    assert said.code == 0, said.err
    assert "window-1" in said.out


def pair(folder: Path, **sections: Any) -> Path:
    return config_of(
        folder, teacher={"model": bert(1, 24)}, method={"name": "toy_methods:Pair"}, **sections
    )


@pytest.fixture(scope="module")
def paired(one_rank, tmp_path_factory) -> Path:
    """A run of two models that learn, which was stopped once."""
    folder = tmp_path_factory.mktemp("paired")
    config = pair(folder, log={"logging_steps": 1}, save={"save_steps": 1})
    stopped = one_rank.train("--config", config, stop_at=("student", 2))
    said = one_rank.train("--config", config)
    assert stopped.code != 0
    assert said.code == 0, said.err
    return folder / "out"


def test_a_method_of_two_models_that_learn_is_planned(one_rank, tmp_path):
    planned = one_rank.megakd("plan", pair(tmp_path))

    assert planned.code == 0, planned.err


def test_two_models_learn_in_one_engine(paired):
    out = paired
    own = [value for _, value in logged(out, "train/teacher/hard_cross_entropy")["student"]]
    assert own[-1] < own[0]
    assert "train/soft_target_kl" in (out / "metrics.jsonl").read_text()


def in_checkpoint(checkpoint: Path, learner: int) -> dict[str, torch.Tensor]:
    """What the engine has of a learner; ZeRO 2 keeps the weights whole."""
    engine = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    prefix = f"learners.{learner}."
    return {k.removeprefix(prefix): v for k, v in engine.items() if k.startswith(prefix)}


def test_every_model_that_learns_is_written_and_loads_with_transformers(paired):
    checkpoint = paired / "checkpoints" / "student" / "step-4"
    stage = paired / "stages" / "student"

    for learner, place in enumerate((stage, stage / "teacher")):
        model = AutoModelForSequenceClassification.from_pretrained(place)
        trained = in_checkpoint(checkpoint, learner)
        assert trained
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(weight, trained[name], rtol=0, atol=0, msg=name)


def test_the_student_leaves_without_the_model_that_learned_beside_it(paired):
    assert weights(paired / "final").keys() == weights(paired / "stages" / "student").keys()
    assert not (paired / "final" / "teacher").exists()


def test_damage_of_a_model_that_learned_beside_another_is_found(paired, tmp_path):
    stage = Path(shutil.copytree(paired / "stages" / "student", tmp_path / "student"))
    weights_there = stage / "teacher" / "model.safetensors"
    spoilt = bytearray(weights_there.read_bytes())
    spoilt[-1] ^= 1
    weights_there.write_bytes(spoilt)

    with pytest.raises(CheckpointError, match=r"checksum of teacher/model\.safetensors differs"):
        open_finished(stage, remedy="")
    with pytest.raises(ModelError, match=r"checksum of model\.safetensors differs"):
        check_given(stage / "teacher", "teacher.model")


def test_the_best_evaluation_keeps_every_model_that_learns(one_rank, tmp_path):
    config = pair(tmp_path, eval={"eval_steps": 2, "keep_best": True})

    said = one_rank.train("--config", config)

    assert said.code == 0, said.err
    kept = tmp_path / "out" / "checkpoints" / "student" / "best" / "teacher"
    assert_same_weights(kept, tmp_path / "out" / "stages" / "student" / "teacher")
