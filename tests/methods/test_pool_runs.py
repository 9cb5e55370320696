"""Whole runs with several teachers, as a user starts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank, Said
from safetensors.torch import load_file
from tiny_runs import bert, config_tree, write_config, write_reviews
from whole_run import finish, read

STEPS = 12
SIZES = {"small": (1, 16), "middle": (2, 24), "large": (3, 32)}


class Bench:
    """Three teachers of different sizes that all runs share."""

    def __init__(self, one_rank: OneRank, folder: Path) -> None:
        self.one_rank, self.folder = one_rank, folder
        reviews = write_reviews(folder / "reviews")
        self.task = {"type": "classification", "dataset": str(reviews)}
        for number, (name, (layers, width)) in enumerate(SIZES.items()):
            tree = config_tree(
                folder / name, self.task, student={"model": bert(layers, width=width)}, seed=number
            )
            tree["train"] |= {"per_device_train_batch_size": 8, "max_steps": 10 + 10 * number}
            finish(one_rank, write_config(folder / f"{name}.yaml", tree))

    def teachers(self, *names: str) -> list[dict[str, Any]]:
        return [{"name": name, "model": str(self.folder / name / "final")} for name in names]

    def config(self, out: str, method: dict[str, Any], **sections: Any) -> Path:
        models = {"teachers": self.teachers(*SIZES), "method": method}
        task = self.task | sections.pop("task", {})
        tree = config_tree(self.folder / out, task, **{**models, **sections})
        usual = {"per_device_train_batch_size": 8, "max_steps": STEPS}
        tree["train"] |= usual | sections.get("train", {})
        return write_config(self.folder / f"{out}.yaml", tree)

    def run(self, out: str, method: dict[str, Any], **sections: Any) -> Path:
        finish(self.one_rank, self.config(out, method, **sections))
        return self.folder / out

    def refused(self, method: dict[str, Any], **sections: Any) -> Said:
        said = self.one_rank.train("--config", self.config("refused", method, **sections))
        assert said.code == 2, said.out
        assert not said.loaded
        return said


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    return Bench(one_rank, tmp_path_factory.mktemp("pools"))


@pytest.fixture(scope="module")
def drawn(bench) -> Path:
    return bench.run("uniform", {"name": "skdbert"})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def pool(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in read(out)["pool"]["teachers"]}


def stages(out: Path) -> list[str]:
    return [stage["name"] for stage in read(out)["stages"]]


def test_every_step_has_one_teacher_and_the_report_counts_them(drawn):
    counted = {name: entry["steps"] for name, entry in pool(drawn).items()}

    assert sum(counted.values()) == STEPS
    assert set(counted) == set(SIZES)
    assert [entry["weight"] for entry in pool(drawn).values()] == pytest.approx([1 / 3] * 3)
    assert read(drawn)["pool"]["distribution"] == "uniform"


def test_the_report_has_every_teacher_and_measures_against_the_largest(drawn):
    report = read(drawn)

    assert [entry["name"] for entry in report["teachers"]] == list(SIZES)
    sizes = {entry["name"]: entry["parameters"] for entry in report["teachers"]}
    assert sizes["small"] < sizes["middle"] < sizes["large"]
    assert report["teacher"]["parameters"] == sizes["large"]
    assert {entry["model"] for entry in report["latency"]} == {*SIZES, "student"}


def test_the_page_and_the_card_name_the_teachers(drawn):
    page = (drawn / "report.html").read_text()
    card = (drawn / "final" / "README.md").read_text()

    assert all(name in page and name in card for name in SIZES)
    assert "the largest teacher" in page


@pytest.mark.parametrize("method", ["skdbert", "mean_of_teachers", "takd"])
def test_a_pool_of_one_is_plain_distillation_bit_for_bit(bench, method):
    """Whatever a method does with several teachers, one leaves it no choice."""
    sections = {"teachers": bench.teachers("large")}
    plain = bench.run(
        f"plain-{method}",
        {"name": "single", "teacher": "large"},
        objective=[{"loss": "soft_target_kl"}],
        **sections,
    )

    assert same(bench.run(f"one-{method}", {"name": method}, **sections), plain)


def test_one_teacher_may_be_drawn_always_and_the_others_never_run(bench):
    weights_given = {"small": 0.0, "middle": 2.0, "large": 0.0}
    method = {"name": "skdbert", "distribution": "weights", "weights": weights_given}

    out = bench.run("weights", method)

    assert {name: entry["steps"] for name, entry in pool(out).items()} == {
        "small": 0,
        "middle": STEPS,
        "large": 0,
    }
    plain = bench.run(
        "middle-alone",
        {"name": "single", "teacher": "middle"},
        objective=[{"loss": "soft_target_kl"}],
    )
    assert same(out, plain)


def test_teachers_are_ranked_by_their_own_scores_which_are_measured_once(bench):
    out = bench.run("teacher-rank", {"name": "skdbert", "distribution": "teacher_rank"})

    entries = pool(out)
    results = {
        name: json.loads((out / "stages" / f"{name}-scored" / "result.json").read_text())
        for name in SIZES
    }
    assert {n: e["score"] for n, e in entries.items()} == {
        name: result["metrics"]["accuracy"] for name, result in results.items()
    }
    by_score = sorted(entries.values(), key=lambda entry: entry["score"])
    likely = [entry["weight"] for entry in by_score]
    assert likely == sorted(likely)
    assert sum(likely) == pytest.approx(1)


def test_students_of_each_teacher_are_tried_and_shown_with_their_cost(bench):
    method = {"name": "skdbert", "distribution": "student_rank", "pilot_steps": 3}

    out = bench.run("student-rank", method)

    assert stages(out) == ["pilot-small", "pilot-middle", "pilot-large", "student"]
    taken = {stage["name"]: stage["steps"] for stage in read(out)["stages"]}
    assert taken == {"pilot-small": 3, "pilot-middle": 3, "pilot-large": 3, "student": STEPS}
    for name, entry in pool(out).items():
        pilot = json.loads((out / "stages" / f"pilot-{name}" / "result.json").read_text())
        assert entry["score"] == pilot["metrics"]["accuracy"]


def test_all_teachers_run_at_every_step_of_their_mean(bench):
    out = bench.run("mean", {"name": "mean_of_teachers"})

    assert {entry["steps"] for entry in pool(out).values()} == {STEPS}
    assert sum(entry["weight"] for entry in pool(out).values()) == pytest.approx(1)


def test_trust_in_labels_changes_what_the_mean_teaches(bench):
    out = bench.run("mt-bert", {"name": "mt_bert"})

    assert {entry["steps"] for entry in pool(out).values()} == {STEPS}
    assert not same(out, bench.run("mean-again", {"name": "mean_of_teachers"}))


def test_teachers_in_a_row_begin_with_the_largest(bench):
    out = bench.run("takd", {"name": "takd"})

    assert stages(out) == ["middle-taught", "small-taught", "student"]
    given = load_file(bench.folder / "small" / "final" / "model.safetensors")
    taught = load_file(out / "stages" / "small-taught" / "model.safetensors")
    assert given.keys() == taught.keys()
    assert not all(torch.equal(given[name], taught[name]) for name in given)


def test_teachers_of_the_pool_are_fine_tuned_one_by_one(bench):
    trained = [
        {"name": name, "model": bert(layers, width=width), "finetune": {"max_steps": 2}}
        for name, (layers, width) in SIZES.items()
    ]

    out = bench.run("finetuned", {"name": "skdbert"}, teachers=trained)

    assert stages(out) == [*(f"{name}-finetune" for name in SIZES), "student"]


def test_a_finished_run_started_again_prints_its_table(bench, drawn):
    said = bench.one_rank.train("--config", bench.folder / "uniform.yaml")

    assert said.code == 0
    assert "taught by" in said.out
    assert not said.loaded


def test_a_student_begins_as_layers_of_a_teacher_as_it_teaches(bench):
    """Fine-tuned, head included; without a step to take its weights are still the teacher's."""
    large = {"name": "large", "model": str(bench.folder / "large" / "final")}
    pool = [*bench.teachers("small"), {**large, "finetune": {"max_steps": 3}}]
    student = {"model": "from_teacher", "teacher": "large", "layers": [1, 3]}

    out = bench.run(
        "layers", {"name": "skdbert"}, teachers=pool, student=student, train={"learning_rate": 0.0}
    )

    taught = load_file(out / "stages" / "large-finetune" / "model.safetensors")
    ours = weights(out)
    assert len(ours) < len(taught)
    for name, weight in ours.items():
        theirs = taught[name.replace("layer.1.", "layer.2.")]
        torch.testing.assert_close(weight, theirs, rtol=0, atol=0)


def test_other_layers_are_another_student(bench):
    student = {"model": str(bench.folder / "large" / "final"), "layers": [1, 2]}
    bench.run("two-layers", {"name": "skdbert"}, student=student)
    (bench.folder / "two-layers" / "report.json").unlink()

    said = bench.one_rank.train(
        "--config",
        bench.config("two-layers", {"name": "skdbert"}, student={**student, "layers": [1, 3]}),
    )

    assert said.code == 2
    assert "holds the result of another config (model.layers.1: 2 there, 3 here" in said.err


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "one name twice": (
        {"name": "skdbert"},
        {"teachers": ["small", "large", "small"]},
        ('the name "small" is given 2 times',),
    ),
    "the student's name": (
        {"name": "skdbert"},
        {"teachers": [{"name": "student", "model": bert(1)}]},
        ("teachers[0].name", '"student" is what another model of a run is called'),
    ),
    "a negative weight": (
        {"name": "skdbert", "distribution": "weights", "weights": {"small": -1, "large": 1}},
        {"teachers": ["small", "large"]},
        ("method.weights.small", "must be at least 0"),
    ),
    "weights of zero": (
        {"name": "skdbert", "distribution": "weights", "weights": {"small": 0, "large": 0}},
        {"teachers": ["small", "large"]},
        ("method.weights", "all are 0"),
    ),
    "a weight of nobody": (
        {"name": "skdbert", "distribution": "weights", "weights": {"smal": 1, "large": 1}},
        {"teachers": ["small", "large"]},
        ('there is no teacher "smal"; did you mean "small"?', "none for small"),
    ),
    "weights without use": (
        {"name": "skdbert", "weights": {"small": 1, "large": 1}},
        {"teachers": ["small", "large"]},
        ("method.distribution is uniform, which takes none",),
    ),
    "one of several": (
        {"name": "single"},
        {"teachers": ["small", "large"]},
        ("set method.teacher to small or large",),
    ),
    "nobody": (
        {"name": "single", "teacher": "huge"},
        {"teachers": ["small", "large"]},
        ('method.teacher: there is no teacher "huge"',),
    ),
    "a cut of several": (
        {"name": "minidisc"},
        {"teachers": ["small", "large"], "student": {"model": "from_teacher"}},
        ('method "minidisc" cuts one teacher',),
    ),
    "a teacher beside the pool": (
        {"name": "skdbert"},
        {"teachers": ["small", "large"], "teacher": {"model": bert(1)}},
        ("there is a teacher section too",),
    ),
    "layers of unlike teachers": (
        {"name": "skdbert"},
        {"teachers": ["small", "large"], "objective": [{"loss": "hidden_mse"}]},
        ("hidden_mse compares layers", "small 1 x 16, large 3 x 32"),
    ),
    "layers of nobody": (
        {"name": "skdbert"},
        {"teachers": ["small", "large"], "student": {"model": "from_teacher", "layers": 1}},
        ("student.teacher", "set it to small or large"),
    ),
    "a student without layers": (
        {"name": "skdbert"},
        {
            "teachers": ["small", "large"],
            "student": {"model": "from_teacher", "teacher": "large"},
        },
        ("say which layers the student has (student.layers)",),
    ),
    "more layers than there are": (
        {"name": "skdbert"},
        {
            "teachers": ["small", "large"],
            "student": {"model": "from_teacher", "teacher": "large", "layers": [1, 4]},
        },
        ("student.layers: there is no layer 4; the model has 3",),
    ),
    "layers of random weights": (
        {"name": "skdbert"},
        {"teachers": ["small", "large"], "student": {"layers": 1}},
        ("student.layers: a model from random weights has none",),
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


def test_all_teachers_with_other_labels_or_tokens_are_named_at_once(bench, tmp_path):
    """A pool is put together from many places: one message per start would take all day."""
    three = bert(1, width=16, num_labels=3)
    tree = config_tree(
        tmp_path / "three",
        {**bench.task, "dataset": str(_three_classes(tmp_path))},
        student={"model": three},
    )
    finish(bench.one_rank, write_config(tmp_path / "three.yaml", tree))
    other = {"name": "other", "model": str(tmp_path / "three" / "final")}

    said = bench.refused(
        {"name": "skdbert"}, teachers=[*bench.teachers("small"), other, {**other, "name": "again"}]
    )

    assert "teachers[1].model: the model has 3 labels" in said.err
    assert "teachers[2].model: the model has 3 labels" in said.err
    assert "teachers[1].model" in said.err.split("comes with a tokenizer")[0]
    assert "comes with a tokenizer" in said.err


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
