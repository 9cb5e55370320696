"""The losses of a stage are derived once: what a run trains with, its plan is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loss_terms import term_of
from tiny_runs import bert, write_config

from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.contract.stage import Constant, Pass, Stage
from megakd.contract.tasks import STUDENT, TEACHER
from megakd.contract.terms import soft_terms
from megakd.losses.objective import stage_losses
from megakd.models.knowledge import Needs
from megakd.models.source import ReadyTeacher
from megakd.planning.phases import Phase, planned_sources
from megakd.planning.tracing import PhaseTraces
from megakd.training.recipes import completed

KL = term_of("soft_target_kl")
TASK = {"dataset": "anything", "max_length": 16}


def config_of(folder: Path, task: str, model: Any) -> RunConfig:
    tree = {
        "output_dir": str(folder / "out"),
        "task": {**TASK, "type": task},
        "teacher": {"model": model(3, width=32, vocab_size=64)},
        "student": {"model": model(2, width=16, vocab_size=64)},
        "method": {"name": "single"},
        "train": {"per_device_train_batch_size": 2},
    }
    return load_config(write_config(folder / "run.yaml", tree))


class Reading(Constant):
    """A strategy that reads the last hidden states."""

    reads_states = True


def distilled(*objective: Any, reads_states: bool = False) -> Stage:
    return Stage(
        name="student",
        teachers=(TEACHER,),
        objective=objective,
        strategy=(Reading if reads_states else Constant)((Pass(teacher=TEACHER),)),
    )


@pytest.mark.parametrize(
    ("stage", "student", "teacher"),
    [
        (distilled(KL), (), ()),
        (distilled(KL, reads_states=True), (2,), (3,)),
        (distilled(term_of("embedding_mse"), reads_states=True), (0, 2), (0, 3)),
        (distilled(KL, term_of("hidden_mse")), (1, 2), (2, 3)),
    ],
)
def test_hidden_states_are_read_for_losses_and_for_a_strategy(tmp_path, stage, student, teacher):
    sources = planned_sources(config_of(tmp_path, "classification", bert))
    models = {"learners": {STUDENT: sources[STUDENT]}, "teachers": [sources[TEACHER]]}

    losses = stage_losses(stage, "classification", **models, classes=2)

    assert losses.teacher_needs() == Needs(hidden_layers=teacher)
    assert losses.objective().needs == Needs(hidden_layers=student)


def test_a_plan_holds_the_hidden_states_that_a_strategy_reads(tmp_path):
    config = config_of(tmp_path, "classification", bert)
    sources = planned_sources(config)
    teacher = ReadyTeacher(sources[TEACHER], config.teacher_specs[TEACHER])

    def answers(*, reads_states: bool) -> int:
        stage = distilled(*soft_terms("classification"), reads_states=reads_states)
        phase = Phase(
            name=stage.name,
            learners={STUDENT: sources[STUDENT]},
            stage=completed(stage, config),
            teachers={TEACHER: teacher},
        )
        return PhaseTraces(phase, config, "cpu").answers

    last_layer, rows, width = 1, 2, 32
    more = answers(reads_states=True) - answers(reads_states=False)
    assert more == last_layer * rows * TASK["max_length"] * width * 4
