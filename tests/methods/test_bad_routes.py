"""Rows that do not say which teacher they learn from are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from routed_bench import RoutedBench, rows
from tiny_runs import bert, llama, write_jsonl

TEXT = {"type": "causal_lm", "dataset": None, "teacher_column": None}


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> RoutedBench:
    return RoutedBench(one_rank, tmp_path_factory.mktemp("routed"))


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no column": (
        {"task": {"teacher_column": None}},
        ("task.teacher_column: missing", "every training row has to name its teacher"),
    ),
    "another method": (
        {"method": {"name": "skdbert"}},
        (
            'task.teacher_column: method "skdbert" does not choose teachers by row',
            "set method.name to routed",
        ),
    ),
    "no such column": (
        {"task": {"teacher_column": "domain"}},
        ("column 'domain' (task.teacher_column) does not exist", "text, label, expert"),
    ),
    "one teacher": (
        {"teachers": [{"name": "math", "model": bert(1)}]},
        ("math is the only teacher", 'set method.name to "single"'),
    ),
    "a teacher that no row names": (
        {
            "teachers": [
                {"name": name, "model": bert(1), "dtype": "fp32"}
                for name in ("math", "code", "chat")
            ]
        },
        ("no training row names chat", "the rows name math, code"),
    ),
    "layers of unlike teachers": (
        {
            "teachers": [
                {"name": "math", "model": bert(1)},
                {"name": "code", "model": bert(2)},
            ],
            "objective": [{"loss": "hidden_mse"}],
        },
        ("hidden_mse compares layers", "math 1 x 16, code 2 x 16"),
    ),
    "a teacher to fine-tune": (
        {
            "teachers": [
                {"name": "math", "model": bert(1), "finetune": {}},
                {"name": "code", "model": bert(1)},
            ]
        },
        ("teachers[0].finetune: trains on the rows of all teachers",),
    ),
    "cached answers": (
        {
            "teachers": [
                {"name": "math", "model": bert(1)},
                {"name": "code", "model": bert(1), "cache": "caches/code"},
            ]
        },
        ("teachers[1].cache: holds answers to all training rows",),
    ),
    "losses of held-out rows": (
        {"eval": {"losses": True}},
        ("eval.losses: compares held-out rows with the teachers", "remove the key"),
    ),
    "data without columns": (
        {"task": {"dataset": "pydocs", "type": "causal_lm"}, "student": {"model": llama(1)}},
        ("task.dataset: the rows of pydocs name no teachers",),
    ),
    "a stream": (
        {
            "task": {"type": "mlm", "streaming": True},
            "student": {"model": bert(1)},
        },
        ("task.streaming: not supported by method routed",),
    ),
    "an encoded folder": (
        {"task": {"encoded": "rows"}},
        ("task.encoded: not supported by method routed",),
    ),
    "a source without a teacher": (
        {
            "task": {
                **TEXT,
                "mixture": {
                    "sums": {"files": "sums.jsonl", "weight": 1, "teacher": "math"},
                    "talk": {"files": "talk.jsonl", "weight": 1},
                },
            }
        },
        ("task.mixture.talk.teacher: missing", "set task.teacher_column for this source"),
    ),
    "a source of nobody": (
        {
            "task": {
                **TEXT,
                "mixture": {
                    "sums": {"files": "sums.jsonl", "weight": 1, "teacher": "maths"},
                    "talk": {"files": "talk.jsonl", "weight": 1, "teacher": "code"},
                },
            }
        },
        ('task.mixture.sums.teacher: there is no teacher "maths"; did you mean "math"?',),
    ),
    "a column that no source needs": (
        {
            "task": {
                **TEXT,
                "teacher_column": "expert",
                "mixture": {
                    "sums": {"files": "sums.jsonl", "weight": 1, "teacher": "math"},
                    "talk": {"files": "talk.jsonl", "weight": 1, "teacher": "code"},
                },
            }
        },
        ("task.teacher_column: is not read, because every source",),
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_routes_that_cannot_work_are_refused_before_anything_is_loaded(bench, case):
    sections, fragments = CONFIGS[case]

    said = bench.refused(**sections)

    for fragment in fragments:
        assert fragment in said.err


ROWS: dict[str, tuple[object, tuple[str, ...]]] = {
    "an unknown name": ("mathh", ('there is no teacher "mathh"; did you mean "math"?',)),
    "an empty name": (" ", ("names no teacher (got ' ')",)),
    "a missing name": (None, ("names no teacher (got None)",)),
    "a number": (3, ("names no teacher (got 3)",)),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_with_a_bad_name_is_refused_with_its_file_and_place(bench, tmp_path, case):
    value, fragments = ROWS[case]
    bad = [*rows(12), {**rows(1)[0], "expert": value}]
    write_jsonl(tmp_path / "data" / "train.jsonl", bad)
    write_jsonl(tmp_path / "data" / "validation.jsonl", rows(4))

    said = bench.refused(task={"dataset": str(tmp_path / "data")})

    for fragment in (*fragments, "train.jsonl", "line 13"):
        assert fragment in said.err


def test_held_out_rows_need_no_teacher(bench, tmp_path):
    held = [{k: v for k, v in row.items() if k != "expert"} for row in rows(8)]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows())
    write_jsonl(tmp_path / "data" / "validation.jsonl", held)
    scored = write_jsonl(tmp_path / "scored.jsonl", held)

    bench.run(
        "held-out",
        task={"dataset": str(tmp_path / "data"), "evaluation_sets": {"more": str(scored)}},
    )


def test_rows_that_are_held_out_of_the_training_rows_are_scored_like_others(bench, tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", rows(60))

    bench.run("cut", task={"dataset": str(tmp_path / "data")})
