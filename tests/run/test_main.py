"""Files of a whole run: report, student, card, logs and checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lab_scene import config_of, lab_of, pretend_one_rank, save_teacher
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import bert
from transformers import AutoModelForSequenceClassification
from whole_run import (
    EPOCHS,
    LABELLED,
    ROWS_PER_STEP,
    STEPS,
    accuracy_by_hand,
    finish,
    metrics_of,
    of_model,
    read,
    records,
)

from megakd.config.file import load_config
from megakd.engine.optimizer_state import StoredParts
from megakd.run import run_report


def test_a_run_ends_with_its_table_its_card_and_no_stray_warning(whole_run, out, config):
    lines = whole_run.outcome.out.splitlines()
    assert lines[0].endswith("scored on validation")
    assert f"the student is in {out / 'final'}" in lines
    assert [line.split()[0] for line in lines[4:7]] == ["teacher", "student", "alone"]
    assert "measuring latency" not in whole_run.outcome.err
    derived, printed = read(out)["warnings"], whole_run.outcome.err + whole_run.outcome.out
    assert any(one.startswith("only 26 rows were scored, fewer than 100") for one in derived)
    for one in derived:
        printed = printed.replace(f"warning: {one}", "")
    assert re.search(r"\bwarn|Warning", printed) is None
    card = (out / "final" / "README.md").read_text()
    assert f"by distilling `{whole_run.teacher.name}`" in card
    assert f"{read(out)['student.accuracy']:.1%}" in card
    assert f"launch/train.py --config {config}" in card


def test_the_report_has_times_of_all_that_the_run_did(out):
    report = read(out)

    assert (report["environment.ranks"], report["environment.device"]) == (1, "cpu")
    assert report["environment.corpus_content_hash"]
    # Only some builds have their tag in both versions.
    assert report["versions.torch"].split("+")[0] == torch.__version__.split("+")[0]
    phases = {"start", "data", "models", "training", "scoring"}
    assert of_model(report, "seconds").keys() - {"other"} == phases
    for stage in report["stages"]:
        assert min(stage["seconds"], stage["tokens_per_second"]) > 0
        assert stage["peak_memory_bytes"] > 10**8


def test_the_exported_student_has_its_own_weights_alone_and_the_sizes_of_the_report(out):
    student, final = of_model(read(out), "student"), out / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final)
    encoder = sum(p.numel() for p in model.bert.encoder.parameters())

    assert student["parameters"] == sum(p.numel() for p in model.parameters())
    assert student["encoder_parameters"] == encoder
    assert student["bytes"] == (final / "model.safetensors").stat().st_size
    assert set(load_file(final / "model.safetensors")) == set(model.state_dict())
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in final.iterdir()} == files | {"checksums.json", "README.md"}
    # Projections are trained and kept with the checkpoint, and nothing of the teacher.
    names = StoredParts(out / "checkpoints" / "student" / f"step-{STEPS}").names["weight"]
    (beside,) = (name for name in names if not name.startswith("learners."))
    assert beside.startswith("objective.")
    assert {n.removeprefix("learners.0.") for n in names} - {beside} == set(model.state_dict())


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
    folder = out / "stages" / "teacher-finetune"
    outcome = one_rank.megakd("evaluate", config, "--model", folder, code=0)

    metrics = metrics_of(read(out), "teacher")
    first, *rows = outcome.out.splitlines()
    assert first == f"{whole_run.reviews}, validation: 26 rows"
    names = ("accuracy", "f1_macro", "loss")
    assert [row.split() for row in rows] == [[name, f"{metrics[name]:.4f}"] for name in names]


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
    events = EventAccumulator(str(out / "tensorboard" / "student")).Reload()

    assert {"train/loss", "train/gradient_norm", "eval/accuracy"} <= set(events.Tags()["scalars"])
    for tag in events.Tags()["scalars"]:
        expected = [r for r in records(out, "student") if tag in r]
        points = events.Scalars(tag)
        assert [point.step for point in points] == [r["step"] for r in expected]
        values = [r[tag] for r in expected]
        assert [point.value for point in points] == pytest.approx(values, rel=1e-5)


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
    monkeypatch.setattr("megakd.run.run_report.latency_report", fail)

    assert run_report._latency(lab, tmp_path / "teacher", "teacher") == {"batches": []}
    assert f"latency could not be measured: {error}" in caplog.text


# Scores of a teacher: measured where it is loaded anyway, and the same then.


def test_a_teacher_is_loaded_once_for_teaching_and_for_the_report(
    one_rank, whole_run, out, tmp_path
):
    """Or for the report alone, where a kill before it leaves all stages finished."""
    ended = Path(shutil.copytree(out, tmp_path / "ended"))
    (ended / "report.json").unlink()
    shutil.rmtree(ended / "final")

    outcome = finish(one_rank, whole_run.config, f"output_dir={ended}")

    for answer, folder in ((whole_run.outcome, out), (outcome, ended)):
        assert answer.loaded.count(str(folder / "stages/teacher-finetune")) == 1
    assert metrics_of(read(ended), "teacher") == metrics_of(read(out), "teacher")


def test_the_report_has_the_agreement_with_the_teacher(whole_run, out):
    teacher, student = (of_model(read(out), name) for name in ("teacher", "student"))

    # On rows where one of them alone is right, they do not agree.
    right = [
        sum(one["rows"] for one in model["confusion"] if one["label"] == one["predicted"]) / 26
        for model in (teacher, student)
    ]
    assert abs(sum(right) - 1) <= student["agreement"] <= 1 - abs(right[0] - right[1])
    note = f"student and teacher agree on {student['agreement']:.1%} of the rows"
    assert note in whole_run.outcome.out


def test_a_teacher_that_learns_too_briefly_is_told_before_the_student_is_trained(bench):
    finetune = {"max_steps": 40, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    tree = bench.tree(
        teacher={"model": bert(2), "finetune": finetune},
        eval={"eval_steps": 20, "metric": "loss", "latency": False},
    )

    log = bench.start(tree, f"output_dir={bench.folder / 'out'}").err

    warning = log.index("warning: teacher-finetune still rises: ")
    assert warning < log.index("training stage student")
    (again,) = [w for w in read(bench.folder / "out")["warnings"] if "still rises" in w]
    assert f"warning: {again}\n" in log
