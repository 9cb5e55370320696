"""GLUE's submission files: the official names, words and numbers, row by row in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_glue import (
    TEST_ROWS,
    answers_by_hand,
    rows_of,
    write_diagnostic,
    write_glue,
    write_model,
    write_run,
)
from transformers import AutoModelForSequenceClassification

from megakd.data.glue import TASKS

FILES = {
    "cola": {"CoLA.tsv": "CoLA/test.tsv"},
    "sst2": {"SST-2.tsv": "SST-2/test.tsv"},
    "mrpc": {"MRPC.tsv": "MRPC/test.tsv"},
    "stsb": {"STS-B.tsv": "STS-B/test.tsv"},
    "qqp": {"QQP.tsv": "QQP/test.tsv"},
    "mnli": {
        "MNLI-m.tsv": "MNLI/test_matched.tsv",
        "MNLI-mm.tsv": "MNLI/test_mismatched.tsv",
        "AX.tsv": "AX/AX.tsv",
    },
    "qnli": {"QNLI.tsv": "QNLI/test.tsv"},
    "rte": {"RTE.tsv": "RTE/test.tsv"},
    "wnli": {"WNLI.tsv": "WNLI/test.tsv"},
}


@pytest.mark.parametrize("name", FILES)
def test_a_submission_has_the_models_answer_to_every_test_row_in_order(one_rank, tmp_path, name):
    write_glue(tmp_path / "glue", name)
    write_diagnostic(tmp_path / "glue")
    model = write_model(tmp_path / "model", TASKS[name].classes)
    run = write_run(tmp_path, name, tmp_path / "glue")

    words = ("evaluate", run, "--model", model, "--submission", tmp_path / "answers")
    said = one_rank.megakd(*words)

    assert said.code == 0, said.err
    named = said.out.splitlines()[-len(FILES[name]) :]
    assert named == [str(tmp_path / "answers" / file) for file in FILES[name]]
    assert sorted(p.name for p in (tmp_path / "answers").iterdir()) == sorted(FILES[name])
    for file, test in FILES[name].items():
        header, indices, predictions = rows_of(tmp_path / "answers" / file)
        expected = answers_by_hand(name, model, tmp_path / "tokenizer", tmp_path / "glue" / test)
        assert header == "index\tprediction"
        assert indices == list(range(TEST_ROWS))
        assert predictions == expected
        assert len(set(predictions)) > 1


def test_scores_stay_in_the_range_of_the_task(one_rank, tmp_path):
    write_glue(tmp_path / "glue", "stsb")
    model = write_model(tmp_path / "model", ())
    run = write_run(tmp_path, "stsb", tmp_path / "glue")

    one_rank.megakd("evaluate", run, "--model", model, "--submission", tmp_path)

    _, _, predictions = rows_of(tmp_path / "STS-B.tsv")
    assert {"0.000"} < set(predictions)
    assert all(0 <= float(score) <= 5 for score in predictions)


def test_the_model_is_the_runs_own_unless_another_is_given(one_rank, tmp_path):
    write_glue(tmp_path / "glue", "rte")
    run = write_run(tmp_path, "rte", tmp_path / "glue")
    missing = one_rank.megakd("evaluate", run, "--submission", tmp_path)
    write_model(tmp_path / "out" / "final", TASKS["rte"].classes)

    said = one_rank.megakd("evaluate", run, "--submission", tmp_path)

    assert (missing.code, said.code) == (2, 0)
    assert "out/final does not exist; train first, or give --model FOLDER" in missing.err
    assert (tmp_path / "RTE.tsv").is_file()


def test_mnli_without_the_diagnostic_set_has_two_files(one_rank, tmp_path):
    write_glue(tmp_path / "glue", "mnli")
    model = write_model(tmp_path / "model", TASKS["mnli"].classes)
    run = write_run(tmp_path, "mnli", tmp_path / "glue")

    said = one_rank.megakd("evaluate", run, "--model", model, "--submission", tmp_path / "to")

    assert said.code == 0, said.err
    assert sorted(p.name for p in (tmp_path / "to").iterdir()) == ["MNLI-m.tsv", "MNLI-mm.tsv"]


@pytest.fixture
def rte(tmp_path) -> Iterator[tuple[Path, Path]]:
    """A run and a model."""
    write_glue(tmp_path / "glue", "rte")
    run = write_run(tmp_path, "rte", tmp_path / "glue")
    yield run, write_model(tmp_path / "model", TASKS["rte"].classes)
    assert not list(tmp_path.rglob("*RTE.tsv*"))


def test_another_task_has_no_submission(one_rank, rte, tmp_path):
    run, model = rte
    tree = json.loads(run.read_text())
    tree["task"] = {"type": "classification", "dataset": "pydocs"}
    run.write_text(json.dumps(tree))

    said = one_rank.megakd("evaluate", run, "--model", model, "--submission", tmp_path)

    assert said.code == 2
    assert "task.dataset: pydocs is not a GLUE task, and --submission writes" in said.err
    assert said.loaded == ()


def test_a_missing_test_file_is_named_before_a_model_is_loaded(one_rank, rte, tmp_path):
    run, model = rte
    (tmp_path / "glue" / "RTE" / "test.tsv").unlink()

    said = one_rank.megakd("evaluate", run, "--model", model, "--submission", tmp_path)

    assert said.code == 2
    assert "RTE/test.tsv does not exist, and the submission file RTE.tsv needs" in said.err
    assert said.loaded == ()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("entailment", "neutral", "contradiction"), "the model has 3 labels (entailment, neutral"),
        (("yes", "no"), "the model's labels (yes, no) are not those of the data (entailment, not"),
    ],
    ids=["another number", "other names"],
)
def test_a_model_of_other_labels_is_refused(one_rank, rte, tmp_path, classes, message):
    run, _ = rte
    model = write_model(tmp_path / "other", classes)

    said = one_rank.megakd("evaluate", run, "--model", model, "--submission", tmp_path)

    assert said.code == 2
    assert message in said.err


def test_outputs_that_are_not_finite_are_not_written(one_rank, rte, tmp_path):
    run, folder = rte
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    # Finite weights, or the model would be refused: ones times the largest number overflow.
    model.bert.pooler.dense.weight.data.fill_(0.0)
    model.bert.pooler.dense.bias.data.fill_(10.0)
    model.classifier.weight.data.fill_(torch.finfo(torch.float32).max)
    model.save_pretrained(folder)

    said = one_rank.megakd("evaluate", run, "--model", folder, "--submission", tmp_path)

    assert said.code == 2
    assert f"RTE.tsv is not written: the model's outputs are not finite for {TEST_ROWS} of" in (
        said.err
    )


def test_a_file_in_the_place_of_the_folder_is_refused(one_rank, rte, tmp_path):
    run, model = rte
    (tmp_path / "taken").write_text("")

    said = one_rank.megakd("evaluate", run, "--model", model, "--submission", tmp_path / "taken")

    assert said.code == 2
    assert "--submission: " in said.err
    assert "taken is not a writable folder" in said.err
    assert said.loaded == ()


def test_a_submission_of_a_file_is_refused_and_not_of_the_runs_own_data(one_rank, rte, tmp_path):
    run, _ = rte
    (tmp_path / "mine.jsonl").write_text("{}")

    said = one_rank.megakd(
        "evaluate", run, f"task.dataset={tmp_path / 'mine.jsonl'}", "--submission", tmp_path / "s"
    )

    assert said.code == 2
    assert "mine.jsonl" in said.err
    assert not (tmp_path / "s").exists()


def test_json_and_a_submission_exclude_each_other(one_rank, rte, tmp_path):
    run, _ = rte

    said = one_rank.megakd("evaluate", run, "--json", "--submission", tmp_path)

    assert said.code == 2
    assert "--submission computes no metrics; remove --submission or --json" in said.err


@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("cola", "CoLA.tsv", 1063),
        ("mrpc", "MRPC.tsv", 1725),
        ("stsb", "STS-B.tsv", 1379),
        ("rte", "RTE.tsv", 3000),
    ],
)
def test_the_real_test_files_are_answered_whole(one_rank, shared_data, tmp_path, name, file, rows):
    model = write_model(tmp_path / "model", TASKS[name].classes)
    run = write_run(tmp_path, name, shared_data / "glue")

    words = ("eval.per_device_eval_batch_size=100", "--model", model, "--submission", tmp_path)
    said = one_rank.megakd("evaluate", run, *words)

    assert said.code == 0, said.err
    header, indices, predictions = rows_of(tmp_path / file)
    assert header == "index\tprediction"
    assert indices == list(range(rows))
    allowed = {*TASKS[name].classes, "0", "1"} if TASKS[name].classes else set(predictions)
    assert set(predictions) <= allowed
