"""The baseline of a linear classifier on frozen vectors, against transformers and scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import classifier
from sklearn.linear_model import RidgeClassifierCV
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_runs import config_tree, write_config, write_reviews
from transformers import AutoModel, AutoTokenizer
from whole_run import finish, read

EVERY = 16


def rows_of(folder: Path, split: str) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


def vectors(model: Path, texts: list[str], *, first: bool) -> Any:
    """The vectors [N, D] of texts, as sentence-transformers makes them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=EVERY, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(model)(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    return (states[:, 0] if first else (states * mask).sum(1) / mask.sum(1)).numpy()


def run_of(folder: Path, teacher: dict[str, Any], **sections: Any) -> Path:
    task = {"type": "classification", "dataset": str(folder / "reviews"), "max_length": EVERY}
    tree = config_tree(folder / "out", task, teacher=teacher, method={"name": "single"}, **sections)
    return write_config(folder / "run.yaml", {**tree, "baselines": ["frozen"]})


@pytest.mark.parametrize("first", [False, True], ids=["mean", "first token"])
def test_the_baseline_is_a_ridge_on_the_vectors_of_the_model_before_its_fine_tuning(
    one_rank, tmp_path, first
):
    write_reviews(tmp_path / "reviews")
    classifier(tmp_path / "teacher", 2)
    if first:
        (tmp_path / "teacher" / "1_Pooling").mkdir()
        (tmp_path / "teacher" / "1_Pooling" / "config.json").write_text(
            json.dumps({"pooling_mode_cls_token": True})
        )
    teacher = {"model": str(tmp_path / "teacher"), "finetune": {"max_steps": 2}}

    finish(one_rank, run_of(tmp_path, teacher))

    (texts, labels), (others, truth) = (
        rows_of(tmp_path / "reviews", split) for split in ("train", "validation")
    )
    ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-1, 5, 13)))
    ridge.fit(vectors(tmp_path / "teacher", texts, first=first), labels)
    right = ridge.score(vectors(tmp_path / "teacher", others, first=first), truth)
    report = read(tmp_path / "out")
    assert report["frozen.accuracy"] == pytest.approx(right)
    assert "frozen" in report["baselines"]


@pytest.mark.parametrize("is_scratch", [True, False], ids=["from scratch", "finished"])
def test_a_model_that_is_not_pretrained_or_not_fine_tuned_gives_no_such_row(
    one_rank, tmp_path, is_scratch
):
    write_reviews(tmp_path / "reviews")
    classifier(tmp_path / "teacher", 2)
    scratch = {"config": {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 16,
                          "num_attention_heads": 2, "intermediate_size": 32}}  # fmt: skip
    teacher: dict[str, Any] = {"model": str(tmp_path / "teacher")}
    if is_scratch:
        teacher = {"model": scratch, "finetune": {"max_steps": 2}}

    finish(one_rank, run_of(tmp_path, teacher))

    assert read(tmp_path / "out")["baselines"] == []


@pytest.mark.parametrize("has_test", [False, True], ids=["validation alone", "test too"])
def test_rows_with_any_number_of_labels_are_decided_by_the_best_threshold(
    one_rank, tmp_path, has_test
):
    write_reviews(tmp_path / "reviews")
    classifier(tmp_path / "teacher", 2)
    for file in (tmp_path / "reviews").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        sets = [{**row, "label": [row["label"]]} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in sets))
    if has_test:
        held_out = (tmp_path / "reviews" / "validation.jsonl").read_text()
        (tmp_path / "reviews" / "test.jsonl").write_text(held_out)
    teacher = {"model": str(tmp_path / "teacher"), "finetune": {"max_steps": 2}}

    finish(one_rank, run_of(tmp_path, teacher))

    (texts, labels), (others, truth) = (
        rows_of(tmp_path / "reviews", split) for split in ("train", "validation")
    )
    known = np.array([[name in row for name in ("negative", "positive")] for row in labels])
    wanted = np.array([[name in row for name in ("negative", "positive")] for row in truth])
    ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=np.logspace(-1, 5, 13)))
    ridge.fit(vectors(tmp_path / "teacher", texts, first=False), known.astype(int))
    scores = ridge.decision_function(vectors(tmp_path / "teacher", others, first=False))
    shares = 1 / (1 + np.exp(-scores))
    best = max(f1_score(wanted, shares >= at / 100, average="micro") for at in range(1, 100))
    assert read(tmp_path / "out")["frozen.f1_micro"] == pytest.approx(best)
