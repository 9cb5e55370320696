"""The plan and the runs of the evidence: equal costs, copies, cells that are done, and scores."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from stored_cells import FEW, bench_of, one_cell, stored_of

from evidence import run as evidence_plan
from evidence.cells import SAME_RUN
from evidence.run import Answered, accuracy, digest, mean_divergence
from evidence.settings import SETTINGS, Learning, read_table
from lib.data import write_labelled

COLUMNS = ("text", "label")


@pytest.mark.parametrize(
    ("arm", "share"),
    [
        ("ours", None),
        ("twice", 0.5),
        ("same", 1.0),
        ("first", 0.5),
        ("dear before its first step", None),
        ("not yet run", None),
        ("other seeds", 0.4),
        ("alike", 1.0),
    ],
)
def test_equal_cost_is_a_share_of_the_steps_by_the_median_over_the_seeds_of_both(arm, share):
    stored = stored_of(
        *(one_cell("ours", 100, seed=seed) for seed in (1, 2, 3)),
        one_cell("twice", 200),
        one_cell("same", 105),
        one_cell("first", 150, fixed=50),
        one_cell("dear before its first step", 300, fixed=99),
        *(one_cell("other seeds", cost, seed=n) for n, cost in enumerate((400, 200, 250, 1), 1)),
        *(one_cell("alike", cost, seed=n) for n, cost in enumerate((80, 105, 104), 1)),
    )

    assert evidence_plan.cost_share(stored, arm, "ours") == share


def test_a_stored_cell_is_run_again_only_with_other_steps(tmp_path):
    bench, arms = bench_of(tmp_path), ("uniform, T 1", "teacher rank, T 1", "mean, T 1", "labels")
    ours, ranked, mean = (
        dataclasses.replace(one_cell(arm, cost), max_steps=400)
        for arm, cost in zip(arms, (100, 200, 105), strict=False)
    )
    stored = stored_of(ours, ranked, mean)

    known, left = evidence_plan.known_and_left(bench, stored, [1], arms, "steps")
    assert ([c.arm for c in known], [run.name for run in left]) == ([*arms[:3]], ["labels"])

    known, left = evidence_plan.known_and_left(bench, stored, [1], arms[:3], "cost")
    assert known == [dataclasses.replace(mean, basis="cost")]
    assert [(run.name, run.steps) for run in left] == [("teacher rank, T 1", 200)]

    paid = dataclasses.replace(ranked, basis="cost", max_steps=200)
    stored = stored_of(ours, ranked, paid)
    assert evidence_plan.known_and_left(bench, stored, [1], arms[:2], "cost") == ([paid], [])


@pytest.mark.parametrize(
    ("arm", "is_same"),
    [
        ("lambda 0, 0.9", False),  # chooses 0.5
        ("lambda 0.4, 0.9", True),
        ("target barred, 0.9", True),
        ("direct, 0.9", False),
    ],
)
@pytest.mark.parametrize("basis", ["steps", "cost"])
def test_an_arm_with_the_choice_of_the_reference_is_a_copy_of_its_cell(arm, is_same, basis):
    scores = {0.5: 0.9, 0.7: 0.88, 0.85: 0.87, 0.9: 0.7}
    details = {f"trial score {sparsity:g}": score for sparsity, score in scores.items()}
    details["chosen"] = 0.85
    minidisc = dataclasses.replace(one_cell("minidisc, 0.9", 100), details=details)

    copy = evidence_plan.copied(stored_of(minidisc, comparison="minidisc"), arm, 1, basis)

    assert (copy is not None) == is_same
    if copy is not None:
        assert (copy.arm, copy.basis, copy.score) == (arm, basis, 50.0)
        assert copy.details[SAME_RUN]


def test_cells_of_another_setting_have_another_digest():
    longer = Learning(steps=1, rows=64, rate=1e-3)
    others = [dataclasses.replace(FEW, **{model: longer}) for model in ("student", "teacher")]
    renamed = dataclasses.replace(FEW, title="other words", in_plan=False)
    assert len({digest("skdbert", setting) for setting in (FEW, *others)}) == 3
    assert digest("skdbert", renamed) == digest("skdbert", FEW)


def test_equal_teachers_learn_from_bootstraps_of_the_same_labels_with_other_seeds(
    tmp_path, monkeypatch
):
    started = {}

    def run(folder, config):
        started[folder.name] = config
        return {"metric_name": "accuracy"}

    monkeypatch.setattr(evidence_plan, "run_once", run)
    monkeypatch.setattr(evidence_plan, "score_teacher", lambda *given: 80.0)
    bench = bench_of(tmp_path)
    setting = dataclasses.replace(SETTINGS["clinc150-few-equal"], labels=20)
    texts = [(f"text {number}", f"label {number % 4}") for number in range(60)]
    for split in ("train", "validation"):
        write_labelled(bench.folder(setting) / f"data/{split}.csv", texts)

    for name in ("second", "six"):
        evidence_plan.taught(bench, setting, name, 3)

    second, six = (
        read_table(Path(config["task"]["train_files"]), COLUMNS, delimiter=",")
        for config in started.values()
    )
    assert len(second) == len(six) == 20
    assert second != six
    assert len({*second, *six}) <= 20  # of the labelled rows of the run
    assert all(label == f"label {int(text.split()[1]) % 4}" for text, label in second)
    assert started["second-3"]["seed"] != started["six-3"]["seed"]


@pytest.mark.parametrize(("steps", "is_kept"), [(4, True), (5, False)])
def test_a_cell_goes_on_where_it_was_unless_its_config_has_changed(
    tmp_path, monkeypatch, steps, is_kept
):
    ends = [sys.executable, "-c", "pass"]
    monkeypatch.setattr(evidence_plan.launching, "launch_command", lambda *given: ends)
    folder = tmp_path / "cell"

    def config(steps: int) -> dict:
        return {"student": {"layers": (2, 5)}, "train": {"max_steps": steps, "rate": 1e-5}}

    def make(steps: int) -> int:
        def run() -> dict[str, int]:
            evidence_plan.start(folder, config(steps), program="train")
            return {"steps": steps}

        return evidence_plan.once(folder / "cell.json", config(steps), run)["steps"]

    assert make(4) == 4
    (folder / "checkpoint").touch()
    assert make(steps) == steps
    assert (folder / "checkpoint").exists() is is_kept
    assert (folder / "process.json").is_file()


@pytest.mark.parametrize(
    ("stages", "pool", "steps"),
    [
        ({"student": 9}, {"a": 4, "b": 5}, 9),
        ({"student": 9}, {"a": 9, "b": 9}, 18),
        ({"pilot-a": 3, "pilot-b": 3, "student": 9}, {"a": 4, "b": 5}, 15),
        ({"selector": 20, "student": 9}, None, 29),
    ],
    ids=["drawn", "all", "pilots", "selector"],
)
def test_a_teacher_is_counted_in_every_step_that_it_answers(stages, pool, steps):
    stages, teachers = (
        [{"name": name, "steps": count} for name, count in (counts or {}).items()]
        for counts in (stages, pool)
    )
    report = {"pool": teachers if pool else [], "stages": stages}

    assert evidence_plan.teacher_steps(report) == steps


def test_scores_are_those_of_their_definitions():
    teacher, student = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    answered = Answered(np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 9.0]]), ["no", "yes"])

    assert mean_divergence(teacher, student) == pytest.approx(expected)
    assert mean_divergence(teacher, teacher + 3.0) == pytest.approx(0, abs=1e-12)
    assert accuracy(answered, ["yes", "yes", "yes"]) == pytest.approx(200 / 3)


def test_splits_are_disjoint_and_keep_every_row_text(tmp_path):
    for name, count in {"train": 1100, "test": 5}.items():
        (tmp_path / "banking77").mkdir(exist_ok=True)
        with (tmp_path / f"banking77/{name}.csv").open("w", newline="") as file:
            rows = ((f'say "{number}",\n twice', "a") for number in range(count))
            csv.writer(file).writerows([("text", "category"), *rows])

    SETTINGS["banking77-few"].write_splits(tmp_path, tmp_path / "out")

    result = {
        split: read_table(tmp_path / f"out/{split}.csv", COLUMNS, delimiter=",")
        for split in ("train", "validation", "test")
    }
    assert [len(rows) for rows in result.values()] == [100, 1000, 5]
    assert not {*result["train"]} & {*result["validation"]}
    assert result["test"][3][0] == 'say "3",\n twice'
