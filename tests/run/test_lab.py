"""Inheritance of stages, facts of their results, and refusals before models load."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from lab_scene import SIZE, config_of, lab_of, prepared_of, pretend_one_rank, save_teacher, stage_of
from transformers import BertConfig

from megakd.config.run import EvalConfig
from megakd.config.sections import FinetuneOverrides, ScratchModel, TeacherConfig, TrainConfig
from megakd.data.chat_tokens import PROMPT_LENGTH
from megakd.process.record import flatten
from megakd.stage import Stage
from megakd.training.inputs import check_run
from megakd.training.lab import with_defaults
from megakd.training.served_teachers import model_identity
from megakd.training.stage_folder import cached_metrics


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_one_rank(monkeypatch)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "teacher")


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
        source = lab.facts.sources["student"]
        lab.work.assembly.load(source, {}, "fp32", need_head=False, fused="off")
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
    lab = lab_of(config, rows=Dataset.from_dict(rows))

    assert lab.facts.steps(config.train) == 2


def test_a_stage_is_scored_as_many_rows_at_a_time_as_it_trains_with(tmp_path, teacher):
    finetune = FinetuneOverrides(per_device_train_batch_size=2)
    spec = TeacherConfig(model=str(teacher), finetune=finetune)
    config = config_of(tmp_path, teacher=spec, train=TrainConfig(per_device_train_batch_size=5))
    finetuned = with_defaults(Stage(name="f", learners={"teacher": 1.0}), config).train

    assert config.eval_rows(finetuned) == 2
    assert config.eval_rows(with_defaults(stage_of(), config).train) == 5
    assert config.eval_rows() == 5
    given = dataclasses.replace(config, eval=EvalConfig(per_device_eval_batch_size=7))
    assert given.eval_rows() == given.eval_rows(finetuned) == 7


def test_a_model_that_becomes_a_teacher_does_not_answer_from_the_cache_of_another(
    tmp_path, teacher
):
    spec = TeacherConfig(model=str(teacher), cache=tmp_path / "answers")
    lab = lab_of(config_of(tmp_path, teacher=spec))
    made: Any = SimpleNamespace(name="student", folder=teacher)
    name = lab.as_teacher(made)
    assert lab.work.teachers[name].spec == dataclasses.replace(spec, cache=None)


def test_a_teacher_of_random_weights_that_is_not_trained_is_warned_about(tmp_path, caplog):
    scratch = ScratchModel(config={"model_type": "bert", **SIZE, "num_hidden_layers": 2})
    config = config_of(tmp_path, teacher=TeacherConfig(model=scratch))
    check_run(config, prepared_of(config))
    assert "teacher.model has random weights" in caplog.text


# A measurement is made once, and never taken for one of another model or condition.


@pytest.mark.usefixtures("teacher")
def test_a_measurement_is_made_once_and_kept_for_the_next_start_unless_it_fails(
    tmp_path, monkeypatch
):
    measured = list[str]()
    labs = [lab_of(config_of(tmp_path)) for _ in range(2)]
    for lab in labs:
        monkeypatch.setattr(
            lab.work.pool, "score", lambda n: measured.append(n) or {"accuracy": 0.75}
        )
        lab.teacher()

    def fails() -> dict[str, float]:
        raise ValueError("no rows")

    with pytest.raises(ValueError, match="no rows"):
        cached_metrics(labs[0].work.assembly.stage_folder("teacher-scored"), fails)
    assert not (tmp_path / "run" / "stages").exists()
    scores = [lab.dev_score("teacher") for lab in (labs[0], *labs)]
    assert (scores, measured) == ([0.75] * 3, ["teacher"])


def test_another_version_of_transformers_is_the_same_model(monkeypatch):
    def identity() -> dict[str, Any]:
        config = BertConfig(num_hidden_layers=3)
        source: Any = SimpleNamespace(config=config, files=[], layers=None, folder=None)
        return flatten(model_identity(source, seed=1))

    before = identity()
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0.0")

    assert identity() == before
