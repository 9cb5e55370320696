"""A dry run: a few steps of every stage, with their time and memory beside the plan."""

from __future__ import annotations

import pytest
from golden_cases import classifier
from tiny_runs import bert, review_task, run_in
from transformers import AutoModel

STUDENT_OF = {"name": "minidisc", "target_sparsity": 0.75, "sparsities": [0.5, 0.75]}


@pytest.mark.parametrize(
    ("method", "student", "stages"),
    [
        ({"name": "single"}, {"model": bert(1)}, {"teacher-finetune": 8, "student": 20}),
        (
            STUDENT_OF,
            {"model": "from_teacher"},
            {"teacher-finetune": 8, "trial-1": 20, "trial-2": 20},
        ),
    ],
)
def test_every_stage_is_timed_and_nothing_is_written(one_rank, tmp_path, method, student, stages):
    config = run_in(
        tmp_path,
        review_task(tmp_path),
        teacher={"model": bert(2, 32), "finetune": {"max_steps": 8}},
        student=student,
        method=method,
        train={"max_steps": 20},
    )

    outcome = one_rank.train("--config", config, "--dry_run", code=0)

    head, rows = outcome.out.split("cpu, 3 steps of each stage:\n")
    table = [line.split() for line in rows.splitlines()]
    assert table[0][:2] == ["stage", "steps"]
    assert {row[0]: int(row[1]) for row in table[1:-1]} == stages
    assert all(float(row[2]) > 0 for row in table[1:-1])
    assert " ".join(table[-1]).startswith("Training takes about ")
    assert head.startswith(f"{method['name']}: 1 ranks (CPU")
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_gets_its_head_by_fine_tuning_is_stepped_without_it(one_rank, tmp_path):
    base = tmp_path / "base"
    classifier(base, 2)
    AutoModel.from_pretrained(base).save_pretrained(base)
    teacher = {"model": str(base), "finetune": {"max_steps": 8}}
    task = review_task(tmp_path, tokenizer=str(base))
    sections = {"method": {"name": "single"}, "train": {"max_steps": 20}}
    config = run_in(tmp_path, task, teacher=teacher, student={"model": bert(1)}, **sections)

    outcome = one_rank.train("--config", config, "--dry_run", code=0)

    assert "teacher-finetune" in outcome.out
