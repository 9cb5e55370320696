"""Labels with a threshold each: chosen on validation rows, stored, and read by all who decide."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from tiny_runs import bert, review_task, run_in, write_jsonl, write_reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from whole_run import read, records, relabelled

import megakd
from megakd.api import load_config
from megakd.commands.predictions import pipeline_of, predict_texts
from megakd.training.metrics import THRESHOLDS, best_by_label, best_threshold

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"love": "adored", "envy": "jealous", "anger": "furious", "fear": "scared"}
RATES = {"love": 0.5, "envy": 0.3, "anger": 0.15, "fear": 0.3}


def rows(count: int, split: str) -> list[dict[str, Any]]:
    """Comments with labels of different frequency; no validation row has envy."""
    rng, made = random.Random(split), list[dict[str, Any]]()
    for _ in range(count):
        labels = [label for label in WORDS if rng.random() < RATES[label]]
        labels = [one for one in labels if one != "envy" or split != "validation"]
        told = [WORDS[label] for label in labels if rng.random() < 0.8]
        words = [*told, *rng.choices(["the", "film", "was", "it", *WORDS.values()], k=4)]
        rng.shuffle(words)
        made.append({"text": " ".join(words), "labels": labels})
    return made


def write_task(folder: Path) -> dict[str, Any]:
    for split, count in {"train": 96, "validation": 60, "test": 40}.items():
        write_jsonl(folder / "data" / f"{split}.jsonl", rows(count, split))
    return {
        "type": "classification",
        "dataset": str(folder / "data"),
        "labels": [*WORDS],  # not in the order of the alphabet
        "tokenizer": {"type": "wordpiece", "vocab_size": 320},
    }


SECTIONS: dict[str, Any] = {
    "teacher": {"model": bert(2, width=32), "finetune": {"learning_rate": 0.005, "max_steps": 30}},
    "student": {"model": bert(1, width=32)},
    "method": {"name": "single"},
    "train": {"per_device_train_batch_size": 8, "max_steps": 40, "learning_rate": 0.01},
    "eval": {"threshold": "each", "eval_steps": 10},
}


@pytest.fixture(scope="module")
def run(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("each")
    config = run_in(folder, write_task(folder), save={"onnx": True, "save_steps": 5}, **SECTIONS)
    one_rank.train("--config", config, code=0)
    return folder


def stored(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["threshold"]


def logits_of(folder: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, given = AutoTokenizer.from_pretrained(folder), rows(count, split)
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 16}
    inputs = tokenizer([row["text"] for row in given], return_tensors="pt", **options)
    with torch.no_grad():
        logits = model(**inputs).logits.double().numpy()
    return logits, np.array([[label in row["labels"] for label in WORDS] for row in given])


def test_every_label_has_the_threshold_with_its_best_f1_on_the_validation_rows(run):
    logits, truth = logits_of(run / "out" / "final", "validation", 60)
    shares = 1 / (1 + np.exp(-logits))

    thresholds = dict(zip(WORDS, stored(run / "out" / "final"), strict=True))

    assert thresholds["envy"] == best_threshold(logits, truth)  # it has no row to choose by
    for column, label in enumerate(WORDS):
        of_label = truth[:, column], shares[:, column]
        scores = [f1_score(of_label[0], of_label[1] >= t, zero_division=0) for t in THRESHOLDS]
        if label != "envy":
            assert scores[round(thresholds[label] * 100) - 1] == max(scores), label
    assert len({*thresholds.values()}) > 1


def test_the_report_has_the_thresholds_and_the_scores_at_them(run):
    out, report = run / "out", read(run / "out")
    logits, truth = logits_of(out / "final", "test", 40)
    thresholds = stored(out / "final")
    guessed = 1 / (1 + np.exp(-logits)) >= thresholds

    assert report["student.threshold"] == thresholds
    assert report["teacher.threshold"] == stored(out / "stages" / "teacher-finetune")
    assert [one["threshold"] for one in report["student.per_class"]] == thresholds
    for average in ("micro", "macro"):
        f1 = f1_score(truth, guessed, average=average, zero_division=0)
        assert report[f"student.f1_{average}"] == pytest.approx(f1)
    card = (out / "final" / "README.md").read_text()
    assert f"student {min(thresholds):g} to {max(thresholds):g} by label" in card
    stage = next(one for one in report["stages"] if one["name"] == "student")
    assert stage["threshold"] == thresholds


def test_a_prediction_has_the_labels_that_reach_their_own_threshold(run):
    folder, config = run / "out" / "final", load_config(run / "run.yaml")
    logits, _ = logits_of(folder, "test", 40)
    sets = 1 / (1 + np.exp(-logits)) >= stored(folder)
    expected = [{label for label, has in zip(WORDS, row, strict=True) if has} for row in sets]
    texts = [row["text"] for row in rows(40, "test")]

    assert [{*labels} for labels in predict_texts(folder, config, texts)] == expected
    answers = pipeline_of(folder, config)(texts)
    assert [{one["label"] for one in answer} for answer in answers] == expected


def test_the_service_of_the_encoders_page_gives_the_same_labels(run, monkeypatch):
    page = (ROOT / "docs" / "encoder.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n# serve.py\n(.*?)```", page, re.DOTALL)
    folder, texts = run / "out" / "final", [row["text"] for row in rows(40, "test")]
    monkeypatch.setattr(sys, "argv", ["serve.py", str(folder)])
    names: dict[str, Any] = {}

    exec(program.partition("class Service")[0], names)  # noqa: S102 - the program of the page

    expected = predict_texts(folder, load_config(run / "run.yaml"), texts)
    assert [{*answer} for answer in names["classify"](texts)] == [{*one} for one in expected]


def test_a_file_is_scored_and_predicted_at_the_stored_thresholds(one_rank, run, tmp_path):
    test, report = run / "data" / "test.jsonl", read(run / "out")
    words = ("evaluate", run / "run.yaml", "--data", test)

    scores = json.loads(one_rank.megakd(*words, "--json", code=0).out)["metrics"]
    one_rank.megakd(*words, "--to", tmp_path / "told.jsonl", code=0)

    assert [scores[f"{label}/threshold"] for label in WORDS] == report["student.threshold"]
    assert scores["f1_macro"] == pytest.approx(report["student.f1_macro"])
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in told]
    expected = predict_texts(run / "out" / "final", load_config(run / "run.yaml"), texts)
    assert [row["prediction"] for row in told] == expected


def test_a_stopped_run_returns_the_thresholds_of_the_same_evaluation(one_rank, run, tmp_path):
    sections = {"save": {"save_steps": 5}}
    config = run_in(tmp_path, write_task(tmp_path), **SECTIONS, **sections)

    one_rank.train("--config", config, stop_at=("student", 35))
    one_rank.train("--config", config, code=0)

    out, threshold = tmp_path / "out", stored(run / "out" / "final")
    assert stored(out / "final") == threshold
    evaluations = [one for one in records(out, "student") if "eval/f1_micro" in one]
    best = max(evaluations, key=lambda one: one["eval/f1_micro"])
    assert [best[f"eval/{label}/threshold"] for label in WORDS] == threshold


def test_a_label_without_a_row_or_with_every_row_has_a_threshold():
    rng = np.random.default_rng(0)
    truth = np.stack([np.zeros(30), np.ones(30), rng.random(30) < 0.3], axis=1).astype(float)
    logits = 2 * truth - 1 + rng.normal(size=truth.shape)

    none, every, some = best_by_label(logits, truth)

    assert none == best_threshold(logits, truth)
    assert every <= (1 / (1 + np.exp(-logits[:, 1]))).min()
    assert some == best_threshold(logits[:, 2:], truth[:, 2:])


def test_a_teacher_with_its_labels_in_another_order_keeps_their_thresholds(one_rank, run, tmp_path):
    order, names = [2, 0, 3, 1], [*WORDS]
    stage = run / "out" / "stages" / "teacher-finetune"
    teacher = relabelled(stage, tmp_path / "teacher", order, [names[i] for i in order])
    path = teacher / "config.json"
    keys = json.loads(path.read_text())
    path.write_text(json.dumps({**keys, "threshold": [stored(stage)[i] for i in order]}))
    sections = {**SECTIONS, "teacher": {"model": str(teacher)}, "train": {"max_steps": 2}}
    config = run_in(tmp_path, write_task(tmp_path), **sections)

    one_rank.train("--config", config, code=0)

    report, first = read(tmp_path / "out"), read(run / "out")
    assert report["teacher.threshold"] == stored(stage)
    assert report["teacher.f1_macro"] == pytest.approx(first["teacher.f1_macro"])


def test_rows_with_one_label_and_wrong_values_are_refused(one_rank, tmp_path):
    config = run_in(tmp_path, review_task(write_reviews(tmp_path)))

    outcome = one_rank.train("--config", config, "eval.threshold=each", code=2)
    assert "eval.threshold: each is about rows with any number of labels" in outcome.err
    outcome = one_rank.train("--config", config, "eval.threshold=all", code=2)
    (line,) = [one for one in outcome.err.splitlines() if "eval.threshold" in one]
    assert "'one' or 'each'" in line
    assert outcome.loaded == ()


@pytest.mark.parametrize("value", [[0.5, 0.5], [0.5, 0.5, 0.5, "x"], 1.5])
def test_thresholds_that_are_not_of_the_model_are_refused_before_its_weights(run, tmp_path, value):
    (tmp_path / "final").mkdir()
    for path in (run / "out" / "final").glob("[!c]*.json"):  # without checksums.json
        (tmp_path / "final" / path.name).write_bytes(path.read_bytes())
    keys = json.loads((run / "out" / "final" / "config.json").read_text())
    (tmp_path / "final" / "config.json").write_text(json.dumps({**keys, "threshold": value}))

    with pytest.raises(megakd.MegakdError, match=r"and the model has 4 labels; write a number"):
        predict_texts(tmp_path / "final", load_config(run / "run.yaml"), ["a film"])
