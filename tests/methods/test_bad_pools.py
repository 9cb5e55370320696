"""Pools of teachers that cannot work are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pool_bench import Bench
from tiny_runs import bert, config_tree, llama, write_config, write_reviews
from whole_run import finish


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    return Bench(one_rank, tmp_path_factory.mktemp("pools"))


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "one name twice": (
        {"name": "skdbert"},
        {"teachers": ["small", "large", "small"]},
        ('the name "small" is used 2 times',),
    ),
    "the student's name": (
        {"name": "skdbert"},
        {"teachers": [{"name": "student", "model": bert(1)}]},
        ("teachers[0].name", '"student" is the name of another model of the run'),
    ),
    "a negative weight": (
        {"name": "skdbert", "distribution": "weights", "weights": {"small": -1, "large": 1}},
        {"teachers": ["small", "large"]},
        ("method.weights.small", "must be at least 0"),
    ),
    "weights of zero": (
        {"name": "skdbert", "distribution": "weights", "weights": {"small": 0, "large": 0}},
        {"teachers": ["small", "large"]},
        ("method.weights", "method.weights: every weight is 0"),
    ),
    "a weight of nobody": (
        {"name": "skdbert", "distribution": "weights", "weights": {"smal": 1, "large": 1}},
        {"teachers": ["small", "large"]},
        (
            'there is no teacher "smal"; did you mean "small"?',
            "method.weights: no weight for small",
        ),
    ),
    "weights without use": (
        {"name": "skdbert", "weights": {"small": 1, "large": 1}},
        {"teachers": ["small", "large"]},
        ("method.distribution uniform does not use weights",),
    ),
    "one of several": (
        {"name": "single"},
        {"teachers": ["small", "large"]},
        ("set method.teacher to small or large",),
    ),
    "kinds of one of several": (
        {"name": "knowledge_selection"},
        {"teachers": ["small", "large"]},
        ('method "knowledge_selection" uses one of the teachers',),
    ),
    "a name of two words": (
        {"name": "skdbert"},
        {"teachers": [{"name": "b c", "model": bert(1)}]},
        ("teachers[0].name", "must consist of letters, digits, - and _", "'b c'"),
    ),
    "nobody": (
        {"name": "single", "teacher": "huge"},
        {"teachers": ["small", "large"]},
        ('method.teacher: there is no teacher "huge"',),
    ),
    "a cut of several": (
        {"name": "minidisc"},
        {"teachers": ["small", "large"], "student": {"model": "from_teacher"}},
        ('method "minidisc" needs exactly one teacher',),
    ),
    "a teacher beside the pool": (
        {"name": "skdbert"},
        {"teachers": ["small", "large"], "teacher": {"model": bert(1)}},
        ("teacher is set too",),
    ),
    "layers of unlike teachers": (
        {"name": "skdbert"},
        {"teachers": ["small", "large"], "objective": [{"loss": "hidden_mse"}]},
        ("hidden_mse compares layers", "small 1 x 16, large 3 x 32"),
    ),
    "layers of nobody": (
        {"name": "skdbert"},
        {"teachers": ["small", "large"], "student": {"model": "from_teacher", "layers": 1}},
        ("student.teacher", "set student.teacher to small or large"),
    ),
    "a student without layers": (
        {"name": "skdbert"},
        {
            "teachers": ["small", "large"],
            "student": {"model": "from_teacher", "teacher": "large"},
        },
        ("set student.layers",),
    ),
    "more layers than there are": (
        {"name": "skdbert"},
        {
            "teachers": ["small", "large"],
            "student": {"model": "from_teacher", "teacher": "large", "layers": [1, 4]},
        },
        ("student.layers: layer 4 does not exist; the model has the layers 1 to 3",),
    ),
    "layers of random weights": (
        {"name": "skdbert"},
        {"teachers": ["small", "large"], "student": {"layers": 1}},
        ("student.layers: a model with random weights has no layers",),
    ),
    "a round trip": (
        {"name": "takd", "order": ["large", "small", "large"]},
        {"teachers": ["small", "large"]},
        ('"large" is listed 2 times',),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_pools_that_cannot_work_are_refused_before_anything_is_loaded(bench, case):
    method, sections, fragments = BAD[case]
    given = sections["teachers"]
    pool = given if isinstance(given[0], dict) else bench.teachers(*given)

    said = bench.refused(method, **{**sections, "teachers": pool})

    for fragment in fragments:
        assert fragment in said.err


def test_a_cache_of_a_teacher_that_is_taught_first_is_refused_before_its_leg(bench):
    """Without method.order the sizes of the teachers tell which are taught."""
    small, large = bench.teachers("small", "large")

    said = bench.refused({"name": "takd"}, teachers=[{**small, "cache": "answers"}, large])

    assert 'teachers[0].cache: method "takd" trains small before small teaches' in said.err
    assert "only the first teacher, large, can have a cache" in said.err


def test_all_teachers_with_another_task_other_labels_or_tokens_are_named_at_once(bench, tmp_path):
    """A pool is put together from many places: one message per start would take all day."""
    three = bert(1, width=16, num_labels=3)
    tree = config_tree(
        tmp_path / "three",
        {**bench.task, "dataset": str(_three_classes(tmp_path))},
        student={"model": three},
    )
    finish(bench.one_rank, write_config(tmp_path / "three.yaml", tree))
    other = {"name": "other", "model": str(tmp_path / "three" / "final")}
    speaks = {"name": "speaks", "model": llama(1)}

    said = bench.refused(
        {"name": "skdbert"},
        teachers=[*bench.teachers("small"), other, {**other, "name": "again"}, speaks],
    )

    assert "teachers[3].model" in said.err
    assert "llama" in said.err
    assert "teachers[1].model: the model has 3 labels" in said.err
    assert "teachers[2].model: the model has 3 labels" in said.err
    assert "teachers[1].model" in said.err.split("has a tokenizer")[0]
    assert "has a tokenizer" in said.err


def _three_classes(folder: Path) -> Path:
    data = folder / "three-classes"
    data.mkdir()
    for split in ("train", "validation"):
        rows = [{"text": f"word {n % 3} of many", "label": "abc"[n % 3]} for n in range(24)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def test_ranks_without_labels_to_rank_by_are_refused(bench, tmp_path):
    data = write_reviews(tmp_path / "unlabelled")
    rows = [json.loads(line) for line in (data / "validation.jsonl").read_text().splitlines()]
    blank = [{**row, "label": None} for row in rows]
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in blank))

    said = bench.refused(
        {"name": "skdbert", "distribution": "student_rank"},
        task={"dataset": str(data)},
    )

    assert "has no labelled rows to score" in said.err


def test_where_no_teacher_is_left_nothing_else_is_looked_for(bench, tmp_path):
    gone = [{"name": name, "model": str(tmp_path / name)} for name in ("one", "two")]

    said = bench.refused({"name": "skdbert"}, teachers=gone)

    assert all(f"teachers[{i}].model: {gone[i]['model']}" in said.err for i in (0, 1))
    assert "tokenizer" not in said.err
