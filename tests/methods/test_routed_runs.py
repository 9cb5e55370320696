"""Rows that learn from the teacher they name, and routes that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benches import EXPERTS, Bench, furthest_students, taught_by
from benches import expert_rows as rows
from tiny_runs import NO_DROPOUT, bert, review_task, write_jsonl
from whole_run import finish, read

STEPS = 6
STUDENT = {"model": bert(1, **NO_DROPOUT)}
INNER = [{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy"}, {"loss": "hidden_mse"}]


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("routed")
    task = review_task(folder)
    write_jsonl(folder / "reviews" / "train.jsonl", rows())
    train = {"per_device_train_batch_size": 8, "max_steps": STEPS}
    result = Bench(one_rank, folder, task, method={"name": "routed"}, train=train)
    for seed, name in enumerate(EXPERTS):
        result.make(name, bert(2), steps=8, seed=seed)
    result.task = {**task, "teacher_column": "expert"}
    result.shared["teachers"] = result.teachers(*EXPERTS)
    return result


@pytest.fixture(scope="module")
def routed(bench) -> Path:
    return bench.run("routed", baselines=["alone"], save={"save_steps": 2})


def test_the_log_and_the_report_count_the_rows_of_each_teacher(bench, routed):
    named = [row["expert"] for row in rows()]
    counts = {name: named.count(name) for name in EXPERTS}

    assert {name: entry["rows"] for name, entry in taught_by(routed).items()} == counts
    assert {entry["steps"] for entry in taught_by(routed).values()} == {STEPS}
    shares = [entry["weight"] for entry in taught_by(routed).values()]
    assert shares == pytest.approx([count / len(named) for count in counts.values()])
    assert read(routed)["pool.distribution"] == "routed"
    assert "Who taught" in finish(bench.one_rank, bench.folder / "routed.yaml").out


def test_two_names_of_one_teacher_teach_as_this_teacher_alone_however_a_step_is_cut(bench):
    """The parts of every step add up to the step."""
    settings = {"objective": INNER, "student": STUDENT}
    alone = bench.run(
        "alone",
        teachers=bench.teachers("math"),
        method={"name": "single", "teacher": "math"},
        task={"teacher_column": None},
        **settings,
    )
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}

    twice = bench.run("twice", teachers=bench.teachers("math", "code:math"), **settings)

    other, parts = bench.run("other", **settings), bench.run("parts", train=steps, **settings)
    assert furthest_students(twice, alone) < 2e-6
    assert furthest_students(other, alone) > 1e-4
    assert furthest_students(parts, other) < 2e-6


def test_a_run_that_was_stopped_ends_with_the_same_weights(bench, routed, tmp_path):
    killed = bench.continued("routed", tmp_path, "student", 2, ("alone",))

    assert furthest_students(killed, routed) == 0
    assert read(killed)["pool"] == read(routed)["pool"]


NOBODY = {"mixture": {"sums": {"files": "a", "weight": 1, "teacher": "maths"}}}
NOBODY |= {"type": "causal_lm", "dataset": None, "teacher_column": None}


def experts(**layers: int) -> list[dict[str, Any]]:
    return [{"name": name, "model": bert(count), "dtype": "fp32"} for name, count in layers.items()]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"task": {"teacher_column": "domain"}},
            "column 'domain' (task.teacher_column) does not exist … text, label, expert",
        ),
        (
            {"teachers": experts(math=1, code=1, chat=1)},
            "no training row names chat … the rows name math, code",
        ),
        (
            {"teachers": experts(math=1, code=2), "objective": [{"loss": "hidden_mse"}]},
            "hidden_mse compares layers … math 1 x 16, code 2 x 16",
        ),
        (
            {"task": NOBODY},
            'task.mixture.sums.teacher: there is no teacher "maths"; did you mean "math"?',
        ),
    ],
    ids=["no such column", "an idle teacher", "layers of unlike teachers", "a source of nobody"],
)
def test_routes_that_cannot_work_are_refused_before_anything_is_loaded(bench, sections, message):
    outcome = bench.refused(**sections)

    assert all(fragment in outcome.err for fragment in message.split(" … "))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mathh", 'there is no teacher "mathh"; did you mean "math"?'),
        (None, "names no teacher (got None)"),
    ],
)
def test_a_row_with_a_bad_name_is_refused_with_its_file_and_place(bench, tmp_path, value, message):
    write_jsonl(tmp_path / "train.jsonl", [*rows(12), {**rows(1)[0], "expert": value}])
    write_jsonl(tmp_path / "validation.jsonl", rows(4))

    outcome = bench.refused(task={"dataset": str(tmp_path)})

    for fragment in (message, "train.jsonl", "line 13"):
        assert fragment in outcome.err


def test_held_out_rows_need_no_teacher(bench, tmp_path):
    held = [{k: v for k, v in row.items() if k != "expert"} for row in rows(8)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows())
    write_jsonl(tmp_path / "data" / "validation.jsonl", held)
    more = {"evaluation_sets": {"more": str(write_jsonl(tmp_path / "scored.jsonl", held))}}

    bench.run("held-out", task={"dataset": str(tmp_path / "data"), **more}, train={"max_steps": 1})
