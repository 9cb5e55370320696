"""A method of another package with two models that learn, through the real commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_store import flip
from tiny_runs import bert, review_task, run_in
from transformers import AutoModelForSequenceClassification
from whole_run import finish, records, same_weights, weights

from megakd.engine.optimizer_state import StoredParts
from megakd.errors import CheckpointError, ModelError
from megakd.storage.folders import check_given, open_finished


@pytest.fixture(scope="module", autouse=True)
def _toys(repository: Path, packages: Path) -> None:
    shutil.copy(repository / "tests" / "support" / "toy_methods.py", packages)


def pair(folder: Path, **sections: Any) -> Path:
    return run_in(
        folder,
        review_task(folder),
        teacher={"model": bert(1, 24)},
        student={"model": bert(2)},
        method={"name": "toy_methods:Pair"},
        **sections,
    )


@pytest.fixture(scope="module")
def paired(one_rank, tmp_path_factory) -> Path:
    """A run of two models that learn, which was stopped once."""
    folder = tmp_path_factory.mktemp("paired")
    config = pair(folder, log={"logging_steps": 1}, save={"save_steps": 1})
    assert one_rank.megakd("plan", config).code == 0
    assert one_rank.train("--config", config, stop_at=("student", 2)).code != 0
    finish(one_rank, config)
    return folder / "out"


def test_two_models_learn_in_one_engine(paired):
    logged = records(paired, "student")
    losses = [r[name] for r in logged if (name := "train/teacher/hard_cross_entropy") in r]

    assert losses[-1] < losses[0]
    assert any("train/soft_target_kl" in record for record in logged)


def test_every_model_that_learns_is_written_and_the_student_leaves_alone(paired):
    stage, final = paired / "stages" / "student", paired / "final"
    engine = StoredParts(paired / "checkpoints" / "student" / "step-4")

    for learner, place in enumerate((stage, stage / "teacher")):
        model = AutoModelForSequenceClassification.from_pretrained(place)
        for name, weight in model.state_dict().items():
            trained = engine.read("weight", f"learners.{learner}.{name}", slice(0, weight.numel()))
            torch.testing.assert_close(weight.flatten(), trained, rtol=0, atol=0, msg=name)
    assert weights(final).keys() == weights(stage).keys()
    assert not (final / "teacher").exists()


def test_damage_of_a_model_that_learned_beside_another_is_found(paired, tmp_path):
    stage = Path(shutil.copytree(paired / "stages" / "student", tmp_path / "student"))
    flip(stage / "teacher" / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"checksum of teacher/model\.safetensors differs"):
        open_finished(stage, remedy="")
    with pytest.raises(ModelError, match=r"checksum of model\.safetensors differs"):
        check_given(stage / "teacher", "teacher.model")


def test_the_best_evaluation_keeps_every_model_that_learns(one_rank, tmp_path):
    finish(one_rank, pair(tmp_path, eval={"eval_steps": 2, "keep_best": True}))

    kept = tmp_path / "out" / "checkpoints" / "student" / "best" / "teacher"
    assert same_weights(kept, tmp_path / "out" / "stages" / "student" / "teacher")
