"""Whole runs with several teachers, and pools that are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pool_bench import SIZES, STEPS, Bench
from routed_bench import taught_by
from tiny_runs import bert, reviews, write_jsonl, write_reviews
from whole_run import finish, finish_in, forgotten, read, records, same_weights, weights

SKDBERT = {"name": "skdbert"}


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    return Bench(one_rank, tmp_path_factory.mktemp("pools"))


@pytest.fixture(scope="module")
def drawn(bench) -> Path:
    return bench.run("uniform", SKDBERT, save={"save_steps": 5}, eval={"latency": True})


def alone(bench: Bench, out: str, teacher: str, **sections: Any) -> Path:
    """Plain distillation of one of the teachers."""
    kl = [{"loss": "soft_target_kl"}]
    method = {"name": "single", "teacher": teacher}
    return bench.run(out, method, objective=kl, teachers=bench.teachers(teacher), **sections)


@pytest.fixture(scope="module")
def plain(bench) -> Path:
    return alone(bench, "plain", "large")


def stages(out: Path) -> list[str]:
    return [stage["name"] for stage in read(out)["stages"]]


def accuracy(out: Path, stage: str) -> float:
    result = json.loads((out / "stages" / stage / "result.json").read_text())
    return result["metrics"]["accuracy"]


def test_every_step_has_one_teacher_and_the_largest_is_what_the_report_compares_with(drawn):
    report = read(drawn)
    sizes = {name: report[f"{name}.parameters"] for name in report["teachers"]}

    assert list(taught_by(drawn)) == list(sizes) == list(SIZES)
    assert sum(entry["steps"] for entry in taught_by(drawn).values()) == STEPS
    assert [entry["weight"] for entry in taught_by(drawn).values()] == pytest.approx([1 / 3] * 3)
    assert sizes["small"] < sizes["middle"] < sizes["large"]
    assert report["teacher.parameters"] == sizes["large"]
    assert all(report[f"{name}.ms_batch_1"] > 0 for name in ("large", "student"))


def test_the_page_the_card_and_the_table_name_the_teachers(bench, drawn):
    page = bench.one_rank.page(drawn)
    card = (drawn / "final" / "README.md").read_text()

    assert all(name in page and name in card for name in SIZES)
    assert "Who taught" in page
    assert "Who taught" in finish(bench.one_rank, bench.folder / "uniform.yaml").out


@pytest.mark.parametrize("method", ["skdbert", "mean_of_teachers"])
def test_a_pool_of_one_is_plain_distillation_bit_for_bit(bench, plain, method):
    """Whatever a method does with several teachers, one leaves it no choice."""
    pool = bench.teachers("large")

    assert same_weights(
        bench.run(f"one-{method}", {"name": method}, teachers=pool) / "final", plain / "final"
    )


def test_held_out_losses_are_those_to_the_likeliest_teacher_in_every_evaluation(bench):
    """A student that learns nothing is as far from its teacher in every evaluation."""
    likely = {"small": 1, "middle": 2, "large": 1}
    method = {**SKDBERT, "distribution": "weights", "weights": likely}
    options = {"train": {"learning_rate": 1e-12}, "eval": {"eval_steps": 2, "losses": True}}
    out = bench.run("still", method, **options)

    losses, expected = (
        [r["eval/soft_target_kl"] for r in records(folder, "student") if "eval/loss" in r]
        for folder in (out, alone(bench, "still-alone", "middle", **options))
    )
    assert len(losses) > 3
    assert losses == pytest.approx([expected[0]] * len(expected), rel=1e-5)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(bench, drawn, tmp_path):
    killed = forgotten(drawn, tmp_path / "killed", stage="student", after=5)

    outcome = finish(bench.one_rank, bench.folder / "uniform.yaml", f"output_dir={killed}")

    assert "student: resumed at step 5" in outcome.err
    assert same_weights(killed / "final", drawn / "final")
    assert read(killed)["pool"] == read(drawn)["pool"]


def test_teachers_are_ranked_by_their_own_scores_which_are_measured_once(bench):
    out = bench.run("teacher-rank", {"name": "skdbert", "distribution": "teacher_rank"})

    for name, entry in taught_by(out).items():
        assert entry["score"] == accuracy(out, f"{name}-scored")
    by_score = sorted(taught_by(out).values(), key=lambda entry: entry["score"])
    likely = [entry["weight"] for entry in by_score]
    assert likely == sorted(likely)
    assert sum(likely) == pytest.approx(1)


def test_students_of_each_teacher_are_tried_and_shown_with_their_cost(bench):
    out = bench.run("student-rank", {"name": "skdbert", "distribution": "student_rank"})

    taken = {stage["name"]: stage["steps"] for stage in read(out)["stages"]}
    assert taken == dict.fromkeys((*(f"pilot-{name}" for name in SIZES), "student"), STEPS)
    for name, entry in taught_by(out).items():
        assert entry["score"] == accuracy(out, f"pilot-{name}")


def test_all_teachers_run_at_every_step_of_their_mean(bench):
    mean = taught_by(bench.run("mean", {"name": "mean_of_teachers"}))

    assert {entry["steps"] for entry in mean.values()} == {STEPS}
    assert sum(entry["weight"] for entry in mean.values()) == pytest.approx(1)


def test_labels_beside_several_teachers_count_once(bench):
    labels = {"objective": [{"loss": "hard_cross_entropy"}], "train": {"optim": "sgd"}}

    mean, one = (
        bench.run(f"labels-{name}", {"name": name}, **labels)
        for name in ("mean_of_teachers", "skdbert")
    )

    ours, theirs = weights(mean / "final"), weights(one / "final")
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-6, rtol=0)


def test_a_student_begins_as_layers_of_a_teacher_as_it_teaches(bench):
    """Fine-tuned, head included; without a step to take its weights are still the teacher's."""
    tuned = {"finetune": {"max_steps": 3}}
    pool = [{**teacher, **tuned} for teacher in bench.teachers("small", "large")]
    student = {"model": "from_teacher", "teacher": "large", "layers": [1, 3]}
    sections = {"teachers": pool, "student": student, "train": {"learning_rate": 0.0}}

    out = bench.run("layers", SKDBERT, **sections)

    assert stages(out) == ["small-finetune", "large-finetune", "student"]
    taught = weights(out / "stages" / "large-finetune")
    ours = weights(out / "final")
    assert len(ours) < len(taught)
    for name, weight in ours.items():
        theirs = taught[name.replace("layer.1.", "layer.2.")]
        torch.testing.assert_close(weight, theirs, rtol=0, atol=0)
    (out / "report.json").unlink()
    other = {**sections, "student": {**student, "layers": [1, 2]}}
    outcome = bench.one_rank.train("--config", bench.config("layers", SKDBERT, **other), code=2)
    assert "holds a run of another config (student.layers.1: 3 there, 2 here" in outcome.err


FROM_LARGE = {"model": "from_teacher", "teacher": "large"}


@pytest.mark.parametrize(
    ("sections", "fragments"),
    [
        (
            {"objective": [{"loss": "hidden_mse"}]},
            ("hidden_mse compares layers", "small 1 x 16, large 3 x 32"),
        ),
        (
            {"student": {**FROM_LARGE, "layers": [1, 4]}},
            ("student.layers: layer 4 does not exist; the model has the layers 1 to 3",),
        ),
    ],
    ids=["layers of unlike teachers", "more layers than there are"],
)
def test_pools_that_cannot_work_are_refused_before_anything_is_loaded(bench, sections, fragments):
    outcome = bench.refused(SKDBERT, teachers=bench.teachers("small", "large"), **sections)

    for fragment in fragments:
        assert fragment in outcome.err


def test_all_teachers_with_another_task_other_labels_or_tokens_are_named_at_once(bench, tmp_path):
    """A pool is put together from many places: one message per start would take all day."""
    data = tmp_path / "three-classes"
    for split in ("train", "validation"):
        rows = ({"text": f"word {n % 3} of many", "label": "abc"[n % 3]} for n in range(24))
        write_jsonl(data / f"{split}.jsonl", rows)
    three = {"model": bert(1, width=16, num_labels=3)}
    finish_in(bench.one_rank, tmp_path, {**bench.task, "dataset": str(data)}, student=three)
    other = {"name": "other", "model": str(tmp_path / "out" / "final")}
    recurrent = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}
    speaks = {"name": "speaks", "model": {"config": recurrent}}

    outcome = bench.refused(
        SKDBERT, teachers=[*bench.teachers("small"), other, {**other, "name": "again"}, speaks]
    )

    assert "teachers[3].model" in outcome.err
    assert "transformers has no AutoModelForSequenceClassification of a mamba" in outcome.err
    assert "teachers[1].model: the model has 3 labels" in outcome.err
    assert "teachers[2].model: the model has 3 labels" in outcome.err
    assert "teachers[1].model" in outcome.err.split("has a tokenizer")[0]
    assert "has a tokenizer" in outcome.err


def test_ranks_without_labels_to_rank_by_are_refused(bench, tmp_path):
    data = write_reviews(tmp_path / "unlabelled")
    blank = ({**row, "label": None} for row in reviews(26, "validation"))
    write_jsonl(data / "validation.jsonl", blank)

    method = {**SKDBERT, "distribution": "student_rank"}
    outcome = bench.refused(method, task={"dataset": str(data)})

    assert "has no labelled rows to score" in outcome.err


def test_where_no_teacher_is_left_nothing_else_is_looked_for(bench, tmp_path):
    gone = [{"name": name, "model": str(tmp_path / name)} for name in ("one", "two")]

    outcome = bench.refused(SKDBERT, teachers=gone)

    assert all(f"teachers[{i}].model: {gone[i]['model']}" in outcome.err for i in (0, 1))
    assert "tokenizer" not in outcome.err
