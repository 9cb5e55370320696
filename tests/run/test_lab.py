"""Inheritance of stages, facts of their results, and refusals before models load."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from lab_scene import (
    SIZE,
    config_of,
    lab_of,
    prepared_of,
    pretend_one_rank,
    save_teacher,
    stage_of,
)

from megakd.config.models import PooledTeacher, ScratchModel, TeacherConfig
from megakd.config.run import EvalConfig, LogConfig, RunConfig, SaveConfig
from megakd.config.task import TaskConfig
from megakd.config.train import FinetuneOverrides, TrainConfig
from megakd.contract.stage import Stage
from megakd.contract.terms import SoftTargetKl
from megakd.data.chat.tokens import PROMPT_LENGTH
from megakd.errors import TeacherError
from megakd.inputs.inputs import check_run
from megakd.run.stage_identity import stage_identity
from megakd.storage.fingerprint import differences
from megakd.training.recipes import completed, scoring_preset


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_one_rank(monkeypatch)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "teacher")


def fingerprint(config: RunConfig, content: str = "rows", **changes: Any) -> dict[str, Any]:
    lab = lab_of(config, content)
    lab.teacher()
    return stage_identity(completed(stage_of(**changes), lab.config), lab.assembly)


def test_random_weights_are_another_model_with_another_seed_and_stored_ones_are_not(
    tmp_path, teacher
):
    def identities(seed: int) -> tuple[Any, Any]:
        lab = lab_of(config_of(tmp_path, seed=seed))
        drawn = lab._prepared.sources["student"]
        return lab.assembly.identity_of(drawn), lab.assembly.identity_of(lab.source(teacher))

    (drawn, stored), (drawn_anew, stored_again) = identities(1), identities(2)

    assert {**drawn, "seed": 2} == drawn_anew != drawn
    assert stored == stored_again


def test_no_model_is_loaded_on_top_of_one_that_nothing_uses(tmp_path, teacher, monkeypatch):
    """An engine is in cycles, and Python may not collect them for a long time."""
    lab = lab_of(config_of(tmp_path))
    engine = torch.nn.Linear(1, 1)
    engine.itself = [engine]  # type: ignore[assignment]
    earlier, result = weakref.ref(engine), []
    del engine

    def load_model(*_args: Any, **_facts: Any) -> torch.nn.Module:
        result.append(earlier())
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr("megakd.training.assembly.load_model", load_model)
    monkeypatch.setattr("megakd.training.assembly.set_attention", lambda *_: None)
    gc.disable()
    try:
        source = lab._prepared.sources["student"]
        lab.assembly._load(source, {}, "fp32", need_head=False)
    finally:
        gc.enable()

    assert result == [None]


def test_steps_of_a_student_are_those_of_the_rows_that_it_learns_from(tmp_path, teacher):
    """A prompt alone has no token that counts."""
    config = config_of(
        tmp_path,
        teacher=TeacherConfig(model=str(teacher)),
        train=TrainConfig(per_device_train_batch_size=2, num_train_epochs=1),
    )
    rows = {"input_ids": [[3, 4, 5]] * 8, PROMPT_LENGTH: [1, 3] * 4}
    assert lab_of(config, rows=Dataset.from_dict(rows)).steps_of_student() == 2


def test_a_stage_is_scored_as_many_rows_at_a_time_as_it_trains_with(tmp_path, teacher):
    finetune = FinetuneOverrides(per_device_train_batch_size=2)
    spec = TeacherConfig(model=str(teacher), finetune=finetune)
    config = config_of(tmp_path, teacher=spec, train=TrainConfig(per_device_train_batch_size=5))
    finetuned = completed(Stage(name="f", learners={"teacher": 1.0}), config).train

    assert config.eval_rows(finetuned) == 2
    assert config.eval_rows(completed(stage_of(), config).train) == 5
    assert config.eval_rows() == 5
    given = dataclasses.replace(config, eval=EvalConfig(per_device_eval_batch_size=7))
    assert given.eval_rows() == given.eval_rows(finetuned) == 7


@pytest.mark.parametrize(
    "sections",
    [
        {
            "log": LogConfig(logging_steps=1, report_to=()),
            "save": SaveConfig(save_steps=1, save_total_limit=None),
            "eval": EvalConfig(per_device_eval_batch_size=1),
            "baselines": ("alone",),
            "output_dir": Path("elsewhere"),
        },
        {"train": TrainConfig(resume_from_checkpoint=False, kernels="reference")},
        {"train": TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4)},
    ],
    ids=["sections", "train", "split of a step"],
)
def test_what_weights_do_not_depend_on_changes_no_fingerprint(tmp_path, teacher, sections):
    base, other = config_of(tmp_path), config_of(tmp_path, **sections)
    assert differences(fingerprint(base), fingerprint(other)) == ""


@pytest.mark.parametrize(
    ("of_config", "of_stage", "field"),
    [
        ({"seed": 7}, {}, "seed"),
        ({"train": TrainConfig(learning_rate=1.0)}, {}, "train.learning_rate"),
        ({"train": TrainConfig(gradient_accumulation_steps=2)}, {}, "train.rows_per_step"),
        ({"eval": EvalConfig(eval_steps=3)}, {}, "eval.eval_steps"),
        ({"task": TaskConfig(type="classification", dataset="e", max_length=32)}, {}, "task.data"),
        ({}, {"content": "other rows"}, "data: "),
        ({}, {"objective": (SoftTargetKl(loss="soft_target_kl", weight=2.0),)}, "objective.0.wei"),
        ({}, {"learners": {"teacher": 1.0}}, "model."),
        ({}, {"teachers": ()}, "teachers.teacher."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_weights_depend_on_is_named(tmp_path, teacher, of_config, of_stage, field):
    before = fingerprint(config_of(tmp_path))
    after = fingerprint(config_of(tmp_path, **of_config), **of_stage)
    assert any(one.startswith(field) for one in differences(before, after).split("; "))


def test_other_weights_of_a_teacher_are_another_fingerprint(tmp_path, teacher):
    config = config_of(tmp_path)
    before = fingerprint(config)
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert differences(before, fingerprint(config)).startswith("teachers.teacher.model.weights: ")


@pytest.mark.parametrize("name", ["train", "seed"])
def test_a_teacher_named_like_a_part_of_the_fingerprint_hides_nothing(tmp_path, teacher, name):
    def fingerprints(**sections: Any) -> dict[str, Any]:
        teachers = (PooledTeacher(name=name, model=str(teacher)),)
        lab = lab_of(config_of(tmp_path, teacher=None, teachers=teachers, **sections))
        lab.teacher(name)
        return stage_identity(completed(stage_of(teachers=(name,)), lab.config), lab.assembly)

    before = fingerprints()
    after = fingerprints(seed=7, train=TrainConfig(learning_rate=1.0))

    assert differences(before, after).startswith(("seed: ", "train.learning_rate: "))
    assert {"seed", "train.learning_rate"} < {k for k in after if after[k] != before.get(k)}


def test_a_model_that_becomes_a_teacher_does_not_answer_from_the_cache_of_another(
    tmp_path, teacher
):
    spec = TeacherConfig(model=str(teacher), cache=tmp_path / "answers")
    lab = lab_of(config_of(tmp_path, teacher=spec))
    made: Any = SimpleNamespace(name="student", folder=teacher)
    name = lab.as_teacher(made)
    assert lab._teachers[name].spec == dataclasses.replace(spec, cache=None)


@pytest.mark.usefixtures("teacher")
def test_a_teacher_that_cannot_be_loaded_leaves_no_engine_of_others_and_the_first_is_measured(
    tmp_path, monkeypatch
):
    """A stage measures only a teacher that is alone in memory."""
    lab = lab_of(config_of(tmp_path))
    lab.teacher()
    names = ("teacher", "second", "third")
    lab._teachers |= dict.fromkeys(names, lab._teachers["teacher"])
    measured, destroyed = list[str](), list[str]()

    def opened(name: str, stage: Any) -> Any:
        if name == "third":
            raise TeacherError("third cannot be loaded")
        return SimpleNamespace(destroy=lambda: destroyed.append(name))

    monkeypatch.setattr(lab.pool, "open", opened)
    monkeypatch.setattr(lab.pool, "_measure_opened", lambda name, _: measured.append(name))

    with pytest.raises(TeacherError, match="third cannot be loaded"):
        lab.train(stage_of(teachers=names))
    assert measured == ["teacher"]
    assert sorted(destroyed) == ["second", "teacher"]


def test_kept_answers_are_part_of_a_teacher_and_each_kind_is_another(tmp_path, teacher):
    def of_teacher(**spec: Any) -> dict[str, Any]:
        keys = TeacherConfig(model=str(teacher), **spec)
        return fingerprint(config_of(tmp_path, teacher=keys))

    draws = ({}, {"cache_draws": 64}, {"cache_draws": 64, "cache_seed": 1}, {"cache_top_k": 8})
    kept = [of_teacher(cache=tmp_path, **options) for options in draws]

    plain = of_teacher()
    assert of_teacher(cache_draws=16) == plain
    assert kept[-1] == {**plain, "teachers.teacher.cached": 8}
    assert all(one != other for one in kept for other in kept if one is not other)


def test_a_teacher_that_was_only_moved_is_the_same(tmp_path, teacher):
    before = json.loads(json.dumps(fingerprint(config_of(tmp_path))))
    moved = teacher.rename(tmp_path / "moved")
    after = fingerprint(config_of(tmp_path, teacher=TeacherConfig(model=str(moved))))
    assert differences(before, after) == ""


def test_a_teacher_of_random_weights_that_is_not_trained_is_warned_about(tmp_path, caplog):
    scratch = ScratchModel(config={"model_type": "bert", **SIZE, "num_hidden_layers": 2})
    config = config_of(tmp_path, teacher=TeacherConfig(model=scratch))
    check_run(config, prepared_of(config))
    assert "teacher.model has random weights" in caplog.text


@pytest.mark.parametrize(
    ("trained", "scored"),
    [("zero0", "teacher_zero0"), ("zero2", "teacher_zero0"), ("zero3", "teacher_zero3")],
)
def test_a_student_is_scored_sharded_only_if_it_was_trained_so(trained, scored):
    assert scoring_preset(trained) == scored
