"""GLUE's submission files: the official names, words and numbers, row by row in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_glue import (
    LAYOUTS,
    TEST_ROWS,
    answers_by_hand,
    rows_of,
    write_diagnostic,
    write_glue,
    write_model,
    write_run,
    write_tokenizer,
)
from transformers import AutoModelForSequenceClassification, BertTokenizer

from megakd.data.glue import TASKS
from tools import glue_submission

FILES = {name: {f"{folder}.tsv": f"{folder}/test.tsv"} for name, (folder, *_) in LAYOUTS.items()}
FILES["mnli"] = {
    "MNLI-m.tsv": "MNLI/test_matched.tsv",
    "MNLI-mm.tsv": "MNLI/test_mismatched.tsv",
    "AX.tsv": "AX/AX.tsv",
}


def write_whole_model(folder: Path, classes: tuple[str, ...]) -> Path:
    """A model with its tokenizer, as `final/` is."""
    BertTokenizer.from_pretrained(write_tokenizer(folder)).save_pretrained(folder)
    return write_model(folder, classes)


def submit(run: Path, model: Path, to: Path, *words: str) -> int:
    command = ["--config", str(run), "--model", str(model), "--to", str(to), *words]
    return glue_submission.main(command)


@pytest.mark.parametrize("name", FILES)
def test_a_submission_has_the_models_answer_to_every_test_row_in_order(tmp_path, capsys, name):
    write_glue(tmp_path / "glue", name)
    write_diagnostic(tmp_path / "glue")
    classes = TASKS[name].classes
    model = write_whole_model(tmp_path / "model", classes)
    run = write_run(tmp_path, name, tmp_path / "glue")

    assert submit(run, model, tmp_path / "answers") == 0

    named = capsys.readouterr().out.splitlines()
    assert named == [str(tmp_path / "answers" / file) for file in FILES[name]]
    for file, test in FILES[name].items():
        header, indices, predictions = rows_of(tmp_path / "answers" / file)
        expected = answers_by_hand(name, model, tmp_path / "tokenizer", tmp_path / "glue" / test)
        assert header == "index\tprediction"
        assert indices == list(range(TEST_ROWS))
        assert predictions == expected
        assert len(set(predictions)) > 1


def test_labels_are_matched_by_name_not_by_number(tmp_path):
    write_glue(tmp_path / "glue", "rte")
    run = write_run(tmp_path, "rte", tmp_path / "glue")
    model = write_whole_model(tmp_path / "model", TASKS["rte"].classes[::-1])

    assert submit(run, model, tmp_path) == 0

    swapped = dict(zip(TASKS["rte"].classes, TASKS["rte"].classes[::-1], strict=True))
    test = tmp_path / "glue" / "RTE" / "test.tsv"
    by_number = answers_by_hand("rte", model, tmp_path / "tokenizer", test)
    assert rows_of(tmp_path / "RTE.tsv")[2] == [swapped[answer] for answer in by_number]


def test_what_makes_no_submission_is_named_and_nothing_is_written(tmp_path, capsys):
    write_glue(tmp_path / "glue", "rte")
    run = write_run(tmp_path, "rte", tmp_path / "glue")
    model = write_whole_model(tmp_path / "model", TASKS["rte"].classes)
    other = write_whole_model(tmp_path / "other", ("yes", "no"))
    infinite = write_whole_model(tmp_path / "infinite", TASKS["rte"].classes)
    weights = AutoModelForSequenceClassification.from_pretrained(infinite)
    weights.bert.pooler.dense.weight.data.fill_(0.0)
    weights.bert.pooler.dense.bias.data.fill_(10.0)
    weights.classifier.weight.data.fill_(torch.finfo(torch.float32).max)
    weights.save_pretrained(infinite)
    tree = json.loads(run.read_text())
    tree["task"] = {"type": "classification", "dataset": "pydocs"}
    (tmp_path / "pydocs.yaml").write_text(json.dumps(tree))

    cases = {
        "pydocs is not a GLUE task": (tmp_path / "pydocs.yaml", model),
        "nowhere holds no model": (run, tmp_path / "nowhere"),
        "the model's labels (yes, no) are not those of the task": (run, other),
        f"are not finite for {TEST_ROWS} of {TEST_ROWS} rows": (run, infinite),
    }
    for message, (config, folder) in cases.items():
        assert submit(config, folder, tmp_path / "to") == 2
        assert message in capsys.readouterr().err
    (tmp_path / "glue" / "RTE" / "test.tsv").unlink()
    assert submit(run, model, tmp_path / "to") == 2
    assert "RTE/test.tsv does not exist, and RTE.tsv needs its rows" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
