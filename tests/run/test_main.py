"""Files of a whole run: report, student, card, logs and checkpoints."""

from __future__ import annotations

import json
import re

import pytest
import torch
from datasets import Dataset
from lab_scene import config_of, lab_of, pretend_one_rank, save_teacher
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification
from whole_run import (
    EPOCHS,
    LABELLED,
    ROWS_PER_STEP,
    STEPS,
    accuracy_by_hand,
    metrics_of,
    of_model,
    read,
    records,
)

from megakd.config.file import load_config
from megakd.engine.optimizer_state import StoredParts
from megakd.run import run_report


def test_a_run_ends_with_its_table_and_no_stray_warning(whole_run, out):
    assert whole_run.outcome.out.splitlines()[0].endswith("scored on validation")
    assert f"the student is in {out / 'final'}" in whole_run.outcome.out
    assert [line.split()[0] for line in whole_run.outcome.out.splitlines()[4:7]] == [
        "teacher",
        "student",
        "alone",
    ]
    assert re.search(r"\bwarn|Warning", whole_run.outcome.err + whole_run.outcome.out) is None


def test_the_report_has_times_of_both_models_and_of_all_that_the_run_did(out):
    report = read(out)

    for model in ("teacher", "student"):
        assert all(report[f"{model}.ms_batch_{batch}"] > 0 for batch in (1, 32))
    speed = [report[f"student.speedup_batch_1{end}"] for end in ("_low", "", "_high")]
    assert 0 < speed[0] <= speed[1] <= speed[2]
    assert (report["latency.dtype"], report["batches"]) == ("fp32", [1, 32])
    assert (report["environment.ranks"], report["environment.device"]) == (1, "cpu")
    assert report["environment.corpus_content_hash"]
    # Only some builds have their tag in both versions.
    assert report["versions.torch"].split("+")[0] == torch.__version__.split("+")[0]
    phases = {"start", "data", "models", "training", "scoring", "latency"}
    assert of_model(report, "seconds").keys() - {"other"} == phases
    for stage in report["stages"]:
        assert min(stage["seconds"], stage["tokens_per_second"]) > 0
        assert stage["peak_memory_bytes"] > 10**8


def test_sizes_in_the_report_are_those_of_the_exported_model(out):
    student = of_model(read(out), "student")
    model = AutoModelForSequenceClassification.from_pretrained(out / "final")
    encoder = sum(p.numel() for p in model.bert.encoder.parameters())

    assert student["parameters"] == sum(p.numel() for p in model.parameters())
    assert student["encoder_parameters"] == encoder
    assert student["bytes"] == (out / "final" / "model.safetensors").stat().st_size


def test_unlabelled_rows_are_learned_from_by_distilling_alone(out):
    steps = {stage["name"]: stage["steps"] for stage in read(out)["stages"]}

    assert steps == {
        "teacher-finetune": EPOCHS * LABELLED // ROWS_PER_STEP,
        "student": STEPS,
        "alone": EPOCHS * LABELLED // ROWS_PER_STEP,
    }


def test_the_student_scores_the_same_with_plain_transformers_and_in_the_report(
    one_rank, whole_run, out, config
):
    accuracy = accuracy_by_hand(out / "final", whole_run.reviews / "validation.jsonl")

    assert read(out)["student.accuracy"] == pytest.approx(accuracy, abs=1e-9)
    outcome = one_rank.megakd("evaluate", config, "--json")
    scored = json.loads(outcome.out)
    assert scored["metrics"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert (scored["split"], scored["rows"]) == ("validation", 26)


def test_any_folder_is_scored_by_evaluate(one_rank, whole_run, out, config):
    outcome = one_rank.megakd("evaluate", config, "--model", out / "stages" / "teacher-finetune")

    assert outcome.code == 0, outcome.err
    metrics = metrics_of(read(out), "teacher")
    first, *rows = outcome.out.splitlines()
    assert first == f"{whole_run.reviews}, validation: 26 rows"
    assert [row.split() for row in rows] == [
        ["accuracy", f"{metrics['accuracy']:.4f}"],
        ["f1_macro", f"{metrics['f1_macro']:.4f}"],
        ["loss", f"{metrics['loss']:.4f}"],
    ]


def test_the_exported_student_has_its_own_weights_alone(out):
    names = set(load_file(out / "final" / "model.safetensors"))
    model = AutoModelForSequenceClassification.from_pretrained(out / "final")

    assert names == set(model.state_dict())
    assert {path.name for path in (out / "final").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "checksums.json",
        "README.md",
    }


def test_projections_are_trained_and_kept_with_the_checkpoint_and_nothing_of_the_teacher(out):
    names = StoredParts(out / "checkpoints" / "student" / f"step-{STEPS}").names["weight"]

    beside = [name for name in names if not name.startswith("learners.")]
    assert len(beside) == 1
    assert beside[0].startswith("objective.")
    student = AutoModelForSequenceClassification.from_pretrained(out / "final")
    assert {n.removeprefix("learners.0.") for n in names} - set(beside) == set(student.state_dict())


def test_the_model_card_says_where_the_student_comes_from(out, config, whole_run):
    card = (out / "final" / "README.md").read_text()
    for text in (
        f"by distilling `{whole_run.teacher.name}`",
        f"{read(out)['student.accuracy']:.1%}",
        f"launch/train.py --config {config}",
    ):
        assert text in card


def test_every_term_apart_and_the_runs_health_are_logged(out):
    logged = [r for r in records(out, "student") if "train/loss" in r]

    assert [r["step"] for r in logged] == list(range(2, STEPS + 1, 2))
    for r in logged:
        terms = (r["train/soft_target_kl"], r["train/hard_cross_entropy"], r["train/hidden_mse"])
        assert r["train/loss"] == pytest.approx(
            0.5 * terms[0] + 0.5 * terms[1] + 0.1 * terms[2], rel=1e-5
        )
        assert r["train/gradient_norm"] > 0
        assert 0 <= r["train/top1_agreement"] <= 1
        assert 0 < r["train/teacher_share"] < 1
        assert 0 <= r["train/data_share"] < 1
        assert r["train/memory_bytes"] > 10**8
    assert [r["train/learning_rate"] for r in logged] == pytest.approx(
        [0.01 * (1 - (step - 1) / STEPS) for step in range(2, STEPS + 1, 2)]
    )


def test_tensorboard_holds_what_the_log_holds(out):
    stage = "student"
    events = EventAccumulator(str(out / "tensorboard" / stage)).Reload()

    there = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }

    for tag, points in there.items():
        wanted = [(r["step"], r[tag]) for r in records(out, stage) if tag in r]
        assert [step for step, _ in points] == [step for step, _ in wanted]
        assert [v for _, v in points] == pytest.approx([v for _, v in wanted], rel=1e-5)
    assert {"train/loss", "train/gradient_norm", "eval/accuracy"} <= set(there)


def test_the_resolved_config_is_written_as_it_is_printed(one_rank, out, config):
    printed = one_rank.train("--config", config, "--print-config")
    assert printed.out.strip() == (out / "config.yaml").read_text().strip()
    assert load_config(out / "config.yaml") == load_config(config)


@pytest.mark.parametrize("error", [AttributeError("no such layer"), ImportError("no einops")])
def test_a_model_whose_code_cannot_be_timed_does_not_fail_a_run(
    tmp_path, monkeypatch, caplog, error
):
    def fail(*_, **__):
        raise error

    pretend_one_rank(monkeypatch)
    save_teacher(tmp_path / "teacher")
    rows = Dataset.from_dict({"input_ids": [[1, 1]]})
    lab = lab_of(config_of(tmp_path), rows=rows)
    lab.teacher()
    monkeypatch.setattr("megakd.reports.latency.measure_latencies", fail)

    assert run_report._latency(lab, tmp_path / "teacher", "teacher") == {"batches": []}
    assert f"latency could not be measured: {error}" in caplog.text
