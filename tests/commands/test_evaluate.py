"""`megakd evaluate` on files of one's own, named sets in a run, and what the output says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_tokenizers import chat_tokenizer
from tiny_runs import reviews, run_in, text_task, write_config, write_jsonl, write_reviews
from whole_run import accuracy_by_hand, finish, read, relabelled

from megakd.commands import scored_models
from megakd.commands.arguments import scored_model
from megakd.config.file import load_config
from megakd.data.arrow import cache_folder
from megakd.errors import MegakdError, ModelError
from megakd.models import packing


@pytest.fixture
def mine(tmp_path) -> Path:
    return write_jsonl(tmp_path / "mine.jsonl", reviews(40, "mine"))


def scored(answer: Any) -> dict[str, Any]:
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_a_file_of_ones_own_is_scored_whole_and_the_output_says_so(one_rank, whole_run, mine):
    argument = f"--data={mine}"
    few = "task.max_eval_examples=3"  # does not cut a given file
    result = scored(one_rank.megakd("evaluate", whole_run.config, argument, few, "--json"))

    assert (result["file"], result["split"], result["rows"]) == (str(mine), "all rows", 40)
    by_hand = accuracy_by_hand(whole_run.out / "final", mine)
    assert result["metrics"]["accuracy"] == pytest.approx(by_hand)
    text = one_rank.megakd("evaluate", whole_run.config, argument).out.splitlines()
    assert text[0] == f"{mine}, all rows: 40 rows"
    error = (by_hand * (1 - by_hand) / 40) ** 0.5
    assert result["standard_errors"]["accuracy_standard_error"] == pytest.approx(error)
    assert any(re.fullmatch(rf"accuracy +{by_hand:.4f} ±{error:.4f}", line) for line in text)


def test_rows_of_a_file_get_predictions_and_need_no_labels(one_rank, whole_run, mine, tmp_path):
    rows = [json.loads(line) for line in mine.read_text().splitlines()]
    texts = [{key: row[key] for key in row if key != "label"} for row in rows]
    asked, to = write_jsonl(tmp_path / "asked.jsonl", texts), tmp_path / "answers.jsonl"

    answer = one_rank.megakd("evaluate", whole_run.config, f"--data={asked}", f"--to={to}")

    assert (answer.code, answer.out) == (0, f"{to}: 40 rows\n"), answer.err
    answers = [json.loads(line) for line in to.read_text().splitlines()]
    assert [{k: v for k, v in one.items() if k != "prediction"} for one in answers] == texts
    right = sum(a["prediction"] == row["label"] for a, row in zip(answers, rows, strict=True))
    assert right / 40 == pytest.approx(accuracy_by_hand(whole_run.out / "final", mine))
    refused = one_rank.megakd("evaluate", whole_run.config, f"--to={to}")
    assert (refused.code, "--to: needs --data" in refused.err) == (2, True)


def test_rows_of_one_class_alone_class_numbers_and_other_cases_are_scored(
    one_rank, whole_run, tmp_path
):
    """The classes are the model's: negative is 0, positive is 1."""
    words = [row for row in reviews(20, "x") if row["label"] == "positive"]
    metrics = []
    for label in ("positive", "POSITIVE", 1):
        path = write_jsonl(tmp_path / f"{label}.jsonl", [{**row, "label": label} for row in words])
        result = scored(one_rank.megakd("evaluate", whole_run.config, "--data", path, "--json"))
        metrics.append(result["metrics"])

    assert metrics[0] == metrics[1] == metrics[2]
    by_hand = accuracy_by_hand(whole_run.out / "final", tmp_path / "positive.jsonl")
    assert metrics[0]["accuracy"] == by_hand


def test_an_option_without_a_text_is_refused_and_not_passed_over(one_rank, whole_run):
    """As an unset variable of a script would give it."""
    for option in ("--data", "--model"):
        outcome = one_rank.megakd("evaluate", whole_run.config, option, "", code=2)
        assert f"error: {option}" in outcome.err


def test_a_folder_with_a_test_file_alone_needs_no_training_rows(
    one_rank, whole_run, mine, tmp_path
):
    (tmp_path / "folder").mkdir()
    shutil.copy(mine, tmp_path / "folder" / "test.jsonl")
    gone = json.loads(whole_run.config.read_text())
    gone["teacher"]["model"] = str(tmp_path / "nowhere")
    config = write_config(tmp_path / "run.yaml", gone)

    result = scored(one_rank.megakd("evaluate", config, "--data", tmp_path / "folder", "--json"))

    assert (result["split"], result["rows"]) == ("test", 40)
    by_hand = accuracy_by_hand(whole_run.out / "final", mine)
    assert result["metrics"]["accuracy"] == pytest.approx(by_hand)


def test_a_split_that_was_cut_off_is_said_to_be_one(one_rank, whole_run, tmp_path):
    data = write_jsonl(tmp_path / "all.jsonl", reviews(60, "all"))
    tree = json.loads(whole_run.config.read_text())
    tree["task"] = {"type": "classification", "dataset": str(data), "max_length": 16}
    config = write_config(tmp_path / "run.yaml", tree)

    result = scored(one_rank.megakd("evaluate", config, "--json"))

    assert result["file"] == str(data)
    assert result["split"] == "validation (5% of the training rows, selected by hash)"
    assert result["rows"] < 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "--data: {} does not exist"),
        ("x.jsonl", '{"text": "a", "label": "neutral"}\n', "label 'neutral' is not one of the 2"),
        ("x.jsonl", '{"text": "a"}\n', "column 'label' (task.label_column) does not exist"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused_before_a_model_is_loaded(
    one_rank, whole_run, tmp_path, name, content, message
):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)

    outcome = one_rank.megakd("evaluate", whole_run.config, "--data", path, code=2)

    assert message.format(path) in outcome.err
    assert outcome.loaded == ()


def test_a_model_without_a_tokenizer_is_not_scored(one_rank, whole_run, mine, tmp_path):
    without = shutil.ignore_patterns("tokenizer*", "checksums.json")
    model = shutil.copytree(whole_run.out / "final", tmp_path / "model", ignore=without)

    for words in (("--data", mine), ()):
        outcome = one_rank.megakd("evaluate", whole_run.config, "--model", model, *words, code=2)
        assert "has weights and no tokenizer files" in outcome.err
        assert "set task.tokenizer" in outcome.err


def test_generic_labels_are_not_guessed_and_numbers_of_outputs_need_not_all_occur(
    one_rank, whole_run, mine, tmp_path
):
    model = relabelled(whole_run.teacher, tmp_path / "model", (0, 1), ("LABEL_0", "LABEL_1"))
    hard = write_jsonl(tmp_path / "hard.jsonl", [{"text": "a good film", "label": 1}] * 3)
    words = ("evaluate", whole_run.config, "--model", model)

    for data in (("--data", mine), ()):
        refused = one_rank.megakd(*words, *data, code=2)
        assert "write the data's labels into id2label of the model's config.json" in refused.err
    result = scored(one_rank.megakd(*words, "--data", hard, "--json"))
    assert result["metrics"]["accuracy"] in {0.0, 1.0}


def test_a_run_scores_its_evaluation_sets_at_the_end(one_rank, whole_run, mine, tmp_path):
    data = write_reviews(tmp_path / "reviews")
    task = {
        "type": "classification",
        "train_files": str(data / "tr*.jsonl"),
        "validation_files": str(data / "validation.jsonl"),
        "evaluation_sets": {"mine": str(mine), "all": [str(mine), str(data / "train.jsonl")]},
    }
    teacher = {"model": str(whole_run.teacher)}
    config = run_in(tmp_path, task, teacher=teacher, method={"name": "single"}, baselines=["alone"])

    outcome = finish(one_rank, config)

    report = read(tmp_path / "out")
    scores = {(row["set"], row["model"]): row for row in report["evaluation_sets"]}
    rows = {name: row["rows"] for (name, _), row in scores.items()}
    assert rows == {"mine": 40, "all": 104}
    assert {model for _, model in scores} == {"teacher", "student", "alone"}
    for model, folder in {"teacher": whole_run.teacher, "student": tmp_path / "out/final"}.items():
        result = scores["mine", model]["accuracy"]
        assert result == pytest.approx(accuracy_by_hand(folder, mine))
    assert "\nEvaluation sets\n" in outcome.out
    assert "Evaluation sets" in one_rank.page(tmp_path / "out")
    assert f"\nmine ({mine}): 40 rows\naccuracy  " in one_rank.megakd("evaluate", config).out
    again = scored(one_rank.megakd("evaluate", config, "--json"))
    assert again["evaluation_sets"]["all"]["rows"] == 104
    assert again["evaluation_sets"]["mine"]["metrics"].items() <= scores["mine", "student"].items()


def test_a_model_whose_texts_cannot_share_a_batch_is_named_by_its_key(tmp_path, monkeypatch):
    def refused(config: Any, attention: Any) -> None:
        raise ModelError("a fnet model mixes texts with padding")

    monkeypatch.setattr(packing, "packing_of", refused)
    config = load_config(run_in(tmp_path, text_task(tmp_path)))
    source = SimpleNamespace(where="student.model (--model)", config=None)

    with pytest.raises(ModelError, match=r"^student\.model \(--model\): a fnet model mixes"):
        scored_models._held_out(config, source)


def test_a_scored_model_is_in_the_home_folder_or_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    with pytest.raises(MegakdError) as named:
        scored_model(tmp_path / "runs", "nosuch")
    with pytest.raises(MegakdError, match="train first, or give --model FOLDER"):
        scored_model(tmp_path / "runs", None)

    assert str(named.value).startswith("--model nosuch: the folder does not exist")
    assert "give --model" not in str(named.value)
    assert scored_model(tmp_path / "runs", "~") == tmp_path


# `megakd encode`, which fills the cache that a run reads.


@pytest.mark.parametrize("kind", ["classification", "mlm"])
def test_a_run_reads_what_encode_has_written(one_rank, tmp_path, kind):
    texts = write_reviews(tmp_path / "texts", train=53)  # a number of rows that no other test has
    config = run_in(tmp_path, {"type": kind, "dataset": str(texts), "text_columns": ["text"]})

    answer = one_rank.megakd("encode", config, code=0)

    assert "encoding the rows of train" in answer.err
    assert f"{cache_folder()}: 53 training, 26 validation rows, " in answer.out
    assert " tokens per row" in answer.out
    assert not answer.loaded
    assert "encoding the rows" not in one_rank.train("--config", config, code=0).err


def test_of_a_stream_only_the_held_out_rows_are_encoded(one_rank, tmp_path):
    texts = write_reviews(tmp_path / "texts")
    chat_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    task = {"type": "causal_lm", "dataset": str(texts), "text_columns": ["text"]}
    settings = ("task.streaming=true", "train.max_steps=2", f"task.tokenizer={tmp_path}/tokenizer")

    answer = one_rank.megakd("encode", run_in(tmp_path, task), *settings, code=0)

    assert " validation rows" in answer.out
    assert "training" not in answer.out
