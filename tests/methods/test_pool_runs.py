"""Whole runs with several teachers, as a user starts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pool_bench import SIZES, STEPS, Bench
from safetensors.torch import load_file
from tiny_runs import bert
from whole_run import forgotten, read


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
    assert "Who taught" in page


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


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(bench, tmp_path):
    save = {"save": {"save_steps": 5, "save_total_limit": None}}
    whole = bench.run("whole", {"name": "skdbert"}, **save)
    killed = forgotten(whole, tmp_path / "killed", stage="student", after=5)

    said = bench.one_rank.train("--config", bench.folder / "whole.yaml", f"output_dir={killed}")

    assert said.code == 0, said.err
    assert "student: resumed at step 5" in said.err
    assert same(killed, whole)
    assert read(killed)["pool"] == read(whole)["pool"]


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
    legs = {one["name"]: one for one in read(out)["assistants"]}
    assert list(legs) == ["middle-taught", "small-taught"]
    assert {one["sparsity"] for one in legs.values()} == {None}
    assert all(one["metrics"]["accuracy"] >= 0 for one in legs.values())
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
