"""The losses of a stage are derived once: what a run trains with, its plan is made of."""

from __future__ import annotations

from typing import Any

import pytest
from loss_scene import term_of
from tiny_runs import bert, write_config

from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.config.task import STUDENT, TEACHER
from megakd.config.terms import soft_terms
from megakd.data.batch import Pass
from megakd.losses.objective import stage_losses
from megakd.models.fitting import ReadyTeacher
from megakd.models.outputs import Needs
from megakd.reports.plan_phases import Phase, planned_sources
from megakd.reports.plan_tracing import PhaseTraces
from megakd.stage import Constant, Stage
from megakd.training.lab import with_defaults

KL = term_of("soft_target_kl")
LENGTH, ROWS, WIDTH = 16, 2, 32


@pytest.fixture
def config(tmp_path) -> RunConfig:
    """Three layers teach two."""
    tree = {
        "output_dir": str(tmp_path / "out"),
        "task": {"type": "classification", "dataset": "anything", "max_length": LENGTH},
        "teacher": {"model": bert(3, width=WIDTH, vocab_size=64)},
        "student": {"model": bert(2, width=16, vocab_size=64)},
        "method": {"name": "single"},
        "train": {"per_device_train_batch_size": ROWS},
    }
    return load_config(write_config(tmp_path / "run.yaml", tree))


def weigh(inputs: Any) -> dict[str, float]:
    """Weigh the terms by the last hidden states."""
    raise NotImplementedError


def distilled(*objective: Any, weigh: Any = None) -> Stage:
    plan = Constant((Pass(teacher=TEACHER, weigh=weigh),))
    return Stage(name="student", teachers=(TEACHER,), objective=objective, strategy=plan)


@pytest.mark.parametrize(
    ("stage", "student", "teacher"),
    [
        (distilled(KL), (), ()),
        (distilled(KL, weigh=weigh), (2,), (3,)),
        (distilled(term_of("embedding_mse"), weigh=weigh), (0, 2), (0, 3)),
        (distilled(KL, term_of("hidden_mse")), (1, 2), (2, 3)),
    ],
)
def test_hidden_states_are_read_for_losses_and_for_weights(config, stage, student, teacher):
    sources = planned_sources(config)
    models = {"learners": {STUDENT: sources[STUDENT]}, "teachers": [sources[TEACHER]]}

    losses = stage_losses(stage, "classification", **models, classes=2)

    assert losses.teacher_needs() == Needs(hidden_layers=teacher)
    assert losses.objective().needs == Needs(hidden_layers=student)


def test_a_plan_holds_the_hidden_states_by_which_terms_are_weighed(config):
    sources = planned_sources(config)
    learners = {STUDENT: sources[STUDENT]}
    teachers = {TEACHER: ReadyTeacher(sources[TEACHER], config.teacher_specs[TEACHER])}

    def answers(weigh: Any) -> int:
        stage = with_defaults(distilled(*soft_terms("classification"), weigh=weigh), config)
        phase = Phase(name="student", learners=learners, stage=stage, teachers=teachers)
        return PhaseTraces(phase, config, "cpu").answers

    of_last_layer = ROWS * LENGTH * WIDTH * 4
    assert answers(weigh) - answers(None) == of_last_layer
