"""Whole runs in which every row learns from the teacher that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from routed_bench import EXPERTS, STEPS, RoutedBench, furthest, rows, taught_by
from tiny_runs import NO_DROPOUT, bert
from whole_run import forgotten, read

SOFT = [{"loss": "soft_target_kl"}]
STUDENT = {"model": bert(1, **NO_DROPOUT)}
INNER = [{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy"}, {"loss": "hidden_mse"}]


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> RoutedBench:
    return RoutedBench(one_rank, tmp_path_factory.mktemp("routed"))


@pytest.fixture(scope="module")
def routed(bench) -> Path:
    return bench.run("routed", baselines=["alone"])


def test_the_log_and_the_report_count_the_rows_of_each_teacher(bench, routed):
    named = [row["expert"] for row in rows()]
    counts = {name: named.count(name) for name in EXPERTS}

    assert {name: entry["rows"] for name, entry in taught_by(routed).items()} == counts
    assert {entry["steps"] for entry in taught_by(routed).values()} == {STEPS}
    shares = [entry["weight"] for entry in taught_by(routed).values()]
    assert shares == pytest.approx([count / len(named) for count in counts.values()])
    assert read(routed)["pool"]["distribution"] == "routed"
    said = bench.one_rank.train("--config", bench.folder / "routed.yaml")
    assert "taught by" in said.out
    assert "rows" in said.out


@pytest.mark.parametrize("objective", [SOFT, INNER], ids=["outputs", "layers"])
def test_two_names_of_one_teacher_teach_as_this_teacher_alone(bench, objective):
    """The parts of every step add up to the step, whichever rows they hold."""
    settings = {"objective": objective, "student": STUDENT}
    name = objective[-1]["loss"]
    alone = bench.run(
        f"alone-{name}",
        teachers=bench.teachers("math"),
        method={"name": "single", "teacher": "math"},
        task={"teacher_column": None},
        **settings,
    )

    twice = bench.run(f"twice-{name}", teachers=bench.teachers("math", "code:math"), **settings)

    other = bench.run(f"other-{name}", teachers=bench.teachers("math", "code"), **settings)
    assert furthest(twice, alone) < 2e-6
    assert furthest(other, alone) > 1e-4


def test_a_run_that_was_stopped_ends_with_the_same_weights(bench, tmp_path):
    whole = bench.run("whole", save={"save_steps": 2, "save_total_limit": None})
    killed = forgotten(whole, tmp_path / "killed", stage="student", after=2)

    said = bench.one_rank.train("--config", bench.folder / "whole.yaml", f"output_dir={killed}")

    assert said.code == 0, said.err
    assert "student: resumed at step 2" in said.err
    assert furthest(killed, whole) == 0
    assert read(killed)["pool"] == read(whole)["pool"]


def test_accumulation_does_not_change_what_the_rows_teach(bench):
    settings = {"student": STUDENT, "objective": INNER}
    whole = bench.run("one-micro-batch", **settings)

    parts = bench.run(
        "micro-batches",
        train={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        **settings,
    )

    assert furthest(parts, whole) < 2e-6
