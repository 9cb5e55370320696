"""Scores of a teacher for the report: measured where it is loaded anyway, and the same then."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_runs import bert
from whole_run import finish, metrics_of, of_model, read

TEACHER = "stages/teacher-finetune"


@pytest.fixture
def ended(out, tmp_path) -> Path:
    """The run as a kill before its report would have left it."""
    copy = Path(shutil.copytree(out, tmp_path / "ended"))
    (copy / "report.json").unlink()
    shutil.rmtree(copy / "final")
    return copy


def loads(answer, folder: Path) -> int:
    return answer.loaded.count(str(folder / TEACHER))


def test_a_teacher_is_loaded_once_for_teaching_and_for_the_report(whole_run, out):
    assert loads(whole_run.outcome, out) == 1


def test_a_teacher_that_no_stage_loads_is_loaded_for_the_report(one_rank, whole_run, out, ended):
    outcome = finish(one_rank, whole_run.config, f"output_dir={ended}")

    assert loads(outcome, ended) == 1
    assert metrics_of(read(ended), "teacher") == metrics_of(read(out), "teacher")


def test_the_report_has_the_agreement_with_the_teacher_whose_labels_are_kept(whole_run, out):
    teacher, student = (of_model(read(out), name) for name in ("teacher", "student"))

    # On rows where one of them alone is right, they do not agree.
    right = [
        sum(one["rows"] for one in model["confusion"] if one["label"] == one["predicted"])
        for model in (teacher, student)
    ]
    rows = sum(one["rows"] for one in student["confusion"])
    assert abs(sum(right) - rows) / rows <= student["agreement"]
    assert student["agreement"] <= 1 - abs(right[0] - right[1]) / rows
    note = f"student and teacher agree on {student['agreement']:.1%} of the rows"
    assert note in whole_run.outcome.out


def test_a_teacher_that_learns_too_briefly_is_told_before_the_student_is_trained(bench):
    finetune = {"max_steps": 40, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    tree = bench.tree(
        teacher={"model": bert(2), "finetune": finetune},
        eval={"eval_steps": 20, "metric": "loss", "latency": False},
    )

    log = bench.start(tree, f"output_dir={bench.folder / 'out'}").err

    warning = log.index("warning: teacher-finetune still rises: ")
    assert warning < log.index("training stage student")
    (again,) = [w for w in read(bench.folder / "out")["warnings"] if "still rises" in w]
    assert f"warning: {again}\n" in log
