"""Whole runs with several teachers, and pools that are refused before anything is loaded."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from benches import Bench, furthest, furthest_students, taught_by
from tiny_runs import bert, review_task, reviews, write_jsonl, write_reviews
from whole_run import finish, finish_in, read, records, same_weights, weights

STEPS = 12
SIZES = {"small": (1, 16), "middle": (2, 24), "large": (3, 32)}
SKDBERT = {"name": "skdbert"}


@pytest.fixture(scope="module")
def bench(one_rank, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("pools")
    train = {"per_device_train_batch_size": 8, "max_steps": STEPS}
    result = Bench(one_rank, folder, review_task(folder), train=train)
    for number, (name, (layers, width)) in enumerate(SIZES.items()):
        result.make(name, bert(layers, width), steps=10 + 10 * number, seed=number)
    result.shared["teachers"] = result.teachers(*SIZES)
    return result


@pytest.fixture(scope="module")
def drawn(bench) -> Path:
    return bench.run("uniform", SKDBERT, save={"save_steps": 5})


def alone(bench: Bench, out: str, teacher: str, **sections: Any) -> Path:
    kl = [{"loss": "soft_target_kl"}]
    method = {"name": "single", "teacher": teacher}
    return bench.run(out, method, objective=kl, teachers=bench.teachers(teacher), **sections)


@pytest.fixture(scope="module")
def plain(bench) -> Path:
    return alone(bench, "plain", "large")


def stages(out: Path) -> dict[str, int]:
    return {stage["name"]: stage["steps"] for stage in read(out)["stages"]}


def accuracy(out: Path, stage: str) -> float:
    result = json.loads((out / "stages" / stage / "result.json").read_text())
    return result["metrics"]["accuracy"]


def test_every_step_has_one_teacher_and_the_largest_is_what_the_report_compares_with(bench, drawn):
    report = read(drawn)
    sizes = {name: report[f"{name}.parameters"] for name in report["teachers"]}

    assert list(taught_by(drawn)) == list(sizes) == list(SIZES)
    assert sum(entry["steps"] for entry in taught_by(drawn).values()) == STEPS
    assert [entry["weight"] for entry in taught_by(drawn).values()] == pytest.approx([1 / 3] * 3)
    assert sizes["small"] < sizes["middle"] < sizes["large"] == report["teacher.parameters"]
    page, card = bench.one_rank.page(drawn), (drawn / "final" / "README.md").read_text()
    assert all(name in page and name in card for name in SIZES)
    assert "Who taught" in page
    assert "Who taught" in finish(bench.one_rank, bench.folder / "uniform.yaml").out


@pytest.mark.parametrize("method", ["skdbert", "mean_of_teachers"])
def test_a_pool_of_one_is_plain_distillation_bit_for_bit(bench, plain, method):
    """Whatever a method does with several teachers, one leaves it no choice."""
    one = bench.run(f"one-{method}", {"name": method}, teachers=bench.teachers("large"))

    assert same_weights(one / "final", plain / "final")


def test_held_out_losses_are_those_to_the_likeliest_teacher_and_one_of_weight_zero_is_left_out(
    bench,
):
    """A student that learns nothing is as far from its teacher in every evaluation."""
    method = {
        **SKDBERT,
        "distribution": "weights",
        "weights": {"small": 1, "middle": 3, "large": 0},
    }
    options = {"train": {"learning_rate": 1e-12}, "eval": {"eval_steps": 4, "losses": True}}
    outcome = finish(bench.one_rank, bench.config("still", method, **options))
    out = bench.folder / "still"

    losses, expected = (
        [r["eval/soft_target_kl"] for r in records(folder, "student") if "eval/loss" in r]
        for folder in (out, alone(bench, "still-alone", "middle", **options))
    )
    assert len(losses) > 3
    assert losses == pytest.approx([expected[0]] * len(expected), rel=1e-5)
    weights, steps = ({n: e[key] for n, e in taught_by(out).items()} for key in ("weight", "steps"))
    assert weights == {"small": 0.25, "middle": 0.75, "large": 0.0}
    assert (steps["large"], sum(steps.values())) == (0, STEPS)
    assert not [name for name in outcome.loaded if "large" in name]


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(bench, drawn, tmp_path):
    killed = bench.continued("uniform", tmp_path, "student", 5)

    assert same_weights(killed / "final", drawn / "final")
    assert read(killed)["pool"] == read(drawn)["pool"]


def test_teachers_are_ranked_by_their_own_scores_which_are_measured_once(bench):
    out = bench.run("teacher-rank", {"name": "skdbert", "distribution": "teacher_rank"})

    taught = taught_by(out)
    assert all(entry["score"] == accuracy(out, f"{name}-scored") for name, entry in taught.items())
    likely = [entry["weight"] for entry in sorted(taught.values(), key=itemgetter("score"))]
    assert likely == sorted(likely)
    assert sum(likely) == pytest.approx(1)


def test_all_teachers_run_at_every_step_of_their_mean_and_labels_beside_them_count_once(bench):
    labels = {"objective": [{"loss": "hard_cross_entropy"}], "train": {"optim": "sgd"}}

    mean, one = (
        bench.run(f"labels-{name}", {"name": name}, **labels)
        for name in ("mean_of_teachers", "skdbert")
    )

    assert {entry["steps"] for entry in taught_by(mean).values()} == {STEPS}
    assert sum(entry["weight"] for entry in taught_by(mean).values()) == pytest.approx(1)
    assert furthest_students(mean, one) <= 1e-6


def test_a_student_begins_as_layers_of_a_teacher_as_it_teaches(bench):
    """Fine-tuned, head included; without a step to take its weights are still the teacher's."""
    tuned = {"finetune": {"max_steps": 3}}
    pool = [{**teacher, **tuned} for teacher in bench.teachers("small", "large")]
    student = {"model": "from_teacher", "teacher": "large", "layers": [1, 3]}
    sections = {"teachers": pool, "student": student, "train": {"learning_rate": 0.0}}

    out = bench.run("layers", SKDBERT, **sections)

    assert list(stages(out)) == ["small-finetune", "large-finetune", "student"]
    taught = weights(out / "stages" / "large-finetune")
    ours = weights(out / "final")
    assert len(ours) < len(taught)
    expected = {name: taught[name.replace("layer.1.", "layer.2.")] for name in ours}
    assert furthest(ours, expected) == 0
    (out / "report.json").unlink()
    other = {**sections, "student": {**student, "layers": [1, 2]}}
    outcome = bench.one_rank.train("--config", bench.config("layers", SKDBERT, **other), code=2)
    assert "holds a run of another config (student.layers.1: 3 there, 2 here" in outcome.err


FROM_LARGE = {"model": "from_teacher", "teacher": "large"}


def test_pools_that_cannot_work_are_refused_before_anything_is_loaded(bench):
    pool = bench.teachers("small", "large")
    layers = bench.refused(SKDBERT, teachers=pool, student={**FROM_LARGE, "layers": [1, 4]})
    unlike = bench.refused(SKDBERT, teachers=pool, objective=[{"loss": "hidden_mse"}])

    assert "student.layers: layer 4 does not exist; the model has the layers 1 to 3" in layers.err
    assert "hidden_mse compares layers" in unlike.err
    assert "small 1 x 16, large 3 x 32" in unlike.err


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

    before, tokenizers, _ = outcome.err.partition("has another tokenizer")
    assert tokenizers
    assert "teachers[1].model" in before
    for fragment in (
        "teachers[3].model",
        "transformers has no AutoModelForSequenceClassification of a mamba",
        "teachers[1].model: the model has 3 labels",
        "teachers[2].model: the model has 3 labels",
    ):
        assert fragment in outcome.err


def test_ranks_need_labelled_rows_and_every_teacher_that_is_gone_is_named(bench, tmp_path):
    data = write_reviews(tmp_path / "unlabelled")
    blank = ({**row, "label": None} for row in reviews(26, "validation"))
    write_jsonl(data / "validation.jsonl", blank)
    gone = [{"name": name, "model": str(tmp_path / name)} for name in ("one", "two")]

    method = {**SKDBERT, "distribution": "teacher_rank"}
    unranked = bench.refused(method, task={"dataset": str(data)})
    outcome = bench.refused(SKDBERT, teachers=gone)

    assert "has no labelled rows to score" in unranked.err
    assert all(f"teachers[{i}].model: {gone[i]['model']}" in outcome.err for i in (0, 1))
    assert "tokenizer" not in outcome.err  # where no teacher is left, nothing else is looked for
