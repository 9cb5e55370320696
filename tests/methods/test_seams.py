"""A method of another package with two models that learn, through the real commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_store import flip
from tiny_runs import bert, review_task, run_in
from whole_run import finish, same_weights

from megakd.errors import CheckpointError, ModelError
from megakd.storage.folders import check_given, open_finished


@pytest.fixture(scope="module", autouse=True)
def _toys(repository: Path, packages: Path) -> None:
    shutil.copy(repository / "tests" / "support" / "toy_methods.py", packages)


@pytest.fixture(scope="module")
def paired(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paired")
    config = run_in(
        folder,
        review_task(folder),
        teacher={"model": bert(1, 24)},
        student={"model": bert(2)},
        method={"name": "toy_methods:Pair"},
        eval={"eval_steps": 2, "keep_best": True},
    )
    assert one_rank.megakd("plan", config).code == 0
    finish(one_rank, config)
    return folder / "out"


def test_damage_of_a_model_that_learned_beside_another_is_found(paired, tmp_path):
    stage = Path(shutil.copytree(paired / "stages" / "student", tmp_path / "student"))
    flip(stage / "teacher" / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"checksum of teacher/model\.safetensors differs"):
        open_finished(stage, remedy="")
    with pytest.raises(ModelError, match=r"checksum of model\.safetensors differs"):
        check_given(stage / "teacher", "teacher.model")


def test_the_best_evaluation_keeps_every_model_that_learns(paired):
    (kept,) = (paired / "checkpoints" / "student" / "best").glob("step-*/teacher")
    assert same_weights(kept, paired / "stages" / "student" / "teacher")
