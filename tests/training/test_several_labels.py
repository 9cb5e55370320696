"""Runs whose rows have any number of labels, or the answers of a teacher of one's own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file
from tiny_runs import bert, run_in, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from whole_run import read, records

from megakd.training.metrics import THRESHOLDS, best_threshold, decided, score_of

WORDS = {"anger": "furious", "fear": "scared", "joy": "happy", "love": "adored"}
OTHERS = ["the", "a", "film", "was", "it", "and", "then", "we"]


def rows(count: int, seed: str) -> Iterator[dict[str, Any]]:
    """Comments with none to four emotions, as GoEmotions has them, told by their words."""
    rng = random.Random(seed)
    for _ in range(count):
        labels = [label for label in WORDS if rng.random() < 0.3]
        words = [*(WORDS[label] for label in labels), *rng.choices(OTHERS, k=4)]
        rng.shuffle(words)
        yield {"text": " ".join(words), "labels": labels}


def write_emotions(folder: Path, **columns: Any) -> dict[str, Any]:
    """The task of comments below a folder; `columns` of training rows are made by functions."""
    for split, count in {"train": 96, "validation": 40, "test": 40}.items():
        own = {} if split != "train" else columns
        made = ({**row, **{n: f(row) for n, f in own.items()}} for row in rows(count, split))
        write_jsonl(folder / "emotions" / f"{split}.jsonl", made)
    task = {"type": "classification", "dataset": str(folder / "emotions")}
    return {**task, "tokenizer": {"type": "wordpiece", "vocab_size": 320}}


LONG = {"per_device_train_batch_size": 8, "num_train_epochs": 8, "max_steps": None}


@pytest.fixture(scope="module")
def run(one_rank, tmp_path_factory) -> Path:
    """A run with a teacher that it fine-tunes, and a graph."""
    folder = tmp_path_factory.mktemp("several")
    config = run_in(
        folder,
        write_emotions(folder),
        teacher={"model": bert(2, width=32), "finetune": {"learning_rate": 0.005}},
        student={"model": bert(1, width=32)},
        method={"name": "single"},
        train={**LONG, "learning_rate": 0.01},
        save={"onnx": True},
    )
    one_rank.train("--config", config, code=0)
    return folder


def test_a_run_learns_several_labels_and_shows_their_scores(run):
    report, line = read(run / "out"), "4 classes of 25 to 30 rows, 1.12 labels a row"

    assert report["metric_name"] == "f1_micro"
    assert report["metrics"] == ["f1_micro", "f1_macro", "exact_match", "loss"]
    assert report["student.f1_micro"] > 0.6  # a constant answer has 0.5
    assert report["tfidf.f1_micro"] > 0.9
    assert [one["label"] for one in report["student.per_class"]] == list(WORDS)
    card = (run / "out" / "final" / "README.md").read_text()
    assert all(text in card for text in (line, "exact_match", "threshold: student 0."))


def test_the_threshold_is_that_of_the_validation_rows_and_scores_the_test_rows(run):
    final, report = run / "out" / "final", read(run / "out")
    config = json.loads((final / "config.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = AutoTokenizer.from_pretrained(final)

    def answers(split: str) -> tuple[np.ndarray, np.ndarray]:
        given = list(rows(40, split))
        inputs = tokenizer([row["text"] for row in given], padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits.double().numpy()
        return logits, np.array([[label in row["labels"] for label in WORDS] for row in given])

    threshold = best_threshold(*answers("validation"))
    logits, truth = answers("test")

    assert config["problem_type"] == "multi_label_classification"
    assert config["threshold"] == report["student.threshold"] == threshold
    f1 = score_of("f1_micro", decided(logits, threshold), truth)
    assert report["student.f1_micro"] == pytest.approx(f1)
    (*_, last) = [one for one in records(run / "out", "student") if "eval/threshold" in one]
    assert last["eval/threshold"] == threshold


def test_transformers_and_onnx_give_a_probability_for_every_label(run):
    final, text = run / "out" / "final", "the furious film was scared"
    tokenizer = AutoTokenizer.from_pretrained(final)

    (scores,) = pipeline("text-classification", model=str(final), top_k=None)([text])
    inputs = tokenizer(text, return_tensors="np")
    graph = InferenceSession(final / "model.onnx")
    names = [one.name for one in graph.get_inputs()]
    (logits,) = graph.run(["logits"], {name: inputs[name] for name in names})

    by_name = {one["label"]: one["score"] for one in scores}
    shares = torch.from_numpy(logits[0]).sigmoid().tolist()
    assert [by_name[label] for label in WORDS] == pytest.approx(shares, abs=1e-4)


def test_a_file_is_scored_at_the_stored_threshold(one_rank, run):
    emotions = run / "emotions" / "test.jsonl"

    outcome = one_rank.megakd("evaluate", run / "run.yaml", "--data", emotions, "--json", code=0)

    metrics, report = json.loads(outcome.out)["metrics"], read(run / "out")
    for name in ("f1_micro", "f1_macro", "exact_match", "threshold"):
        assert metrics[name] == pytest.approx(report[f"student.{name}"])


def test_an_int8_graph_is_scored_by_whole_sets_of_labels(one_rank, run, tmp_path):
    outcome = one_rank.megakd(
        *("export", run / "run.yaml", "--to", tmp_path / "small", "--format", "onnx", "--int8"),
        code=0,
    )

    whole = read(run / "out")["student.exact_match"]
    assert f"{whole:.4f}" in outcome.out + outcome.err


@pytest.mark.parametrize("seed", range(3))
def test_the_best_threshold_is_found_among_all(seed):
    random = np.random.default_rng(seed)
    truth = (random.random((50, 4)) < 0.3).astype(float)
    logits = 2 * truth - 1 + random.normal(size=truth.shape)

    scores = {float(t): score_of("f1_micro", decided(logits, t), truth) for t in THRESHOLDS}

    assert scores[best_threshold(logits, truth)] == max(scores.values())


def probabilities(row: dict[str, Any]) -> dict[str, float]:
    return {label: 0.95 if label in row["labels"] else 0.02 for label in WORDS}


def test_a_student_learns_from_answers_in_its_rows_without_a_teacher(one_rank, tmp_path):
    task = write_emotions(tmp_path, answers=probabilities)
    config = run_in(
        tmp_path,
        {**task, "soft_labels": "answers"},
        student={"model": bert(1, width=32)},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl", "temperature": 2.0}],
        train={**LONG, "num_train_epochs": 16, "learning_rate": 0.01},
    )

    one_rank.train("--config", config, code=0)

    report = read(tmp_path / "out")
    assert report["teachers"] == []
    assert report["student.f1_micro"] > 0.6


def single(row: dict[str, Any]) -> str:
    return next(iter(row["labels"]), "anger")


def test_answers_that_are_sure_teach_as_labels_do(one_rank, tmp_path):
    weights = {}
    for loss in ("hard_cross_entropy", "soft_target_kl"):
        folder = tmp_path / loss
        sure = {"p": lambda row: [float(label == single(row)) for label in WORDS]}
        labels = {"one": single} if loss == "hard_cross_entropy" else {}
        task = write_emotions(folder, **labels, **sure)
        for split in ("validation", "test"):
            path = folder / "emotions" / f"{split}.jsonl"
            write_jsonl(path, ({**row, "one": single(row)} for row in rows(40, split)))
        config = run_in(
            folder,
            {**task, "label_column": "one", "labels": list(WORDS), "soft_labels": "p"},
            method={"name": "single"},
            objective=[{"loss": loss}],
        )
        one_rank.train("--config", config, code=0)
        weights[loss] = load_file(folder / "out" / "final" / "model.safetensors")

    for name, weight in weights["hard_cross_entropy"].items():
        assert torch.allclose(weights["soft_target_kl"][name], weight, atol=1e-5), name


SOFT = "task.soft_labels=text"
SINGLE = f"{SOFT}; method.name=single"
REFUSED = [
    ("train.class_weights=balanced", "train.class_weights: weighs or smooths the"),
    (
        "objective=[{loss: hard_cross_entropy, label_smoothing: 0.1}]",
        "objective[0].label_smoothing: weighs or smooths the one label of a row",
    ),
    ("eval.metric=accuracy", "accuracy is about rows with one label, and a row"),
    ("task.multi_label=false", "(where a row has several, every row has a list)"),
    (SOFT, "task.soft_labels: not supported by method finetune; remove it, or use single"),
    (
        SINGLE,
        "train.jsonl, line 1: soft labels (task.soft_labels) is not JSON",
    ),
    (
        f"{SINGLE}; teacher.model=./bert",
        "task.soft_labels: cannot be combined with teacher, which answers too; remove one",
    ),
    (
        f"{SINGLE}; objective=[{{loss: hidden_mse}}]",
        "objective[0].loss: hidden_mse looks into a teacher, of which task.soft_labels has",
    ),
    ("task.label_column=[text, labels]; task.type=regression", "are labels of a"),
]


@pytest.mark.parametrize(("overrides", "text"), REFUSED)
def test_what_does_not_apply_is_refused_before_a_model_is_loaded(
    one_rank, tmp_path, overrides, text
):
    config = run_in(tmp_path, write_emotions(tmp_path))

    outcome = one_rank.train("--config", config, *overrides.split("; "), code=2)

    assert text in outcome.err
    assert outcome.loaded == ()
