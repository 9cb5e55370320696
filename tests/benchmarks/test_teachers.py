"""The benchmark of teachers and kinds: its cells are valid runs, and its counts are right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_runs import bert, config_tree, write_config

from megakd.config.file import load_config

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import legs
import minidisc_cases
import teachers
import teachers_summary


def given(*words: str):
    parsed = teachers.parse([*words, "--output", "out"])
    parsed.teacher = "runs/some-teacher"
    return parsed


@pytest.fixture
def benchmark_root(tmp_path, monkeypatch) -> Path:
    """A repository of its own, so that configs are not written into this one."""
    for module in (teachers, minidisc_cases, legs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("table", "seed"), [("pool", 1), ("kinds", 2)])
def test_every_cell_is_a_valid_config_of_the_same_student_and_steps(benchmark_root, table, seed):
    folder = Path("out/teachers/pydocs")
    options = given("--table", table)
    teachers.write_configs(folder, "pydocs", options)

    cells = list(teachers.legs(folder, "pydocs", seed, options))
    configs = [
        load_config(benchmark_root / leg.config, [*leg.overrides, f"output_dir={leg.output}"])
        for leg in cells
    ]

    assert len({leg.output for leg in cells}) == len(cells) == 10
    assert len({str(config.student) for config in configs}) == 1
    assert len({config.train for config in configs}) == 1
    assert {config.seed for config in configs} == {seed}
    assert {config.task.labelled_examples for config in configs} == {2000}


def report(stages: dict[str, int], pool: dict[str, int] | None = None, *, taught: bool = True):
    teachers_of_pool = [{"name": name, "steps": steps} for name, steps in (pool or {}).items()]
    return {
        "metric_name": "accuracy",
        "student": {"metrics": {"accuracy": 0.5}},
        "teacher": {} if taught else None,
        "pool": {"teachers": teachers_of_pool} if pool else None,
        "stages": [{"name": n, "steps": s, "seconds": 2.0} for n, s in stages.items()],
    }


@pytest.mark.parametrize(
    ("found", "steps"),
    [
        (report({"student": 9}, {"a": 4, "b": 5}), 9),
        (report({"student": 9}, {"a": 9, "b": 9}), 18),
        (report({"pilot-a": 3, "pilot-b": 3, "student": 9}, {"a": 4, "b": 5}), 15),
        (report({"b-taught": 9, "student": 9}), 18),
        (report({"selector": 20, "student": 9}), 29),
        (report({"student": 9}, taught=False), 0),
    ],
    ids=["drawn", "all", "pilots", "a row", "selector", "none"],
)
def test_a_teacher_is_counted_in_every_step_that_it_answers(found, steps):
    assert teachers_summary.teacher_steps(found) == steps


def test_the_table_has_a_line_per_method_and_the_row_all_means():
    found = report({"student": 9}, {"a": 4, "b": 5})
    cells = [
        teachers_summary.cell_of("pydocs", seed, name, found)
        for seed in (1, 2)
        for name in ("uniform", "mean")
    ]

    lines = teachers_summary.table(cells).splitlines()
    (row,) = teachers_summary.rows(cells, "python x.py", "300 steps")

    assert [line.split()[1] for line in lines] == ["method", "uniform", "mean"]
    assert lines[1].split()[2:] == ["2", "50.00", "0.00", "9", "9", "2"]
    assert "uniform 50.00, mean 50.00" in row


def test_planted_labels_are_those_of_other_training_rows_and_the_rest_stays(benchmark_root):
    files = benchmark_root / "files"
    files.mkdir()
    rows = [f"text {row},label {row % 5}" for row in range(50)]
    for name in ("train", "validation", "test"):
        (files / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    tree = config_tree(
        benchmark_root / "unused",
        {"type": "classification", "dataset": str(files), "labelled_examples": 20},
        student={"model": bert(1)},
        method={"name": "finetune"},
    )
    (benchmark_root / "out").mkdir()
    write_config(benchmark_root / "out" / "kinds.yaml", tree)

    planted = benchmark_root / teachers.plant(Path("out"))

    for name in ("validation", "test"):
        assert (planted / f"{name}.csv").read_text().splitlines()[1:] == rows
    found = (planted / "train.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in found] == [row.split(",")[0] for row in rows]
    assert sorted(row.split(",")[1] for row in found) == sorted(r.split(",")[1] for r in rows)
    assert found != rows


def test_the_weights_of_a_selector_are_their_mean_over_the_students_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "selector", "step": 1, "select/soft": 0.9}\n'
        '{"stage": "student", "step": 1, "select/soft": 0.2, "train/loss": 3}\n'
        '{"stage": "student", "step": 2, "select/soft": 0.4}\n'
    )

    assert teachers_summary.selected(tmp_path) == {"soft": pytest.approx(0.3)}
