"""One run with all features, made once for all tests that read its files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from one_rank import OneRank, Outcome
from safetensors.torch import load_file
from tiny_runs import bert, config_tree, run_in, write_config, write_reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

ROWS, LABELLED, ROWS_PER_STEP, EPOCHS = 64, 32, 8, 4
STEPS = EPOCHS * ROWS // ROWS_PER_STEP
CLASSES = {"type": "classification"}


class WholeRun(NamedTuple):
    """`teacher` is the model that the run fine-tunes first; `said` is what the run printed."""

    folder: Path
    teacher: Path
    config: Path
    outcome: Outcome

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def reviews(self) -> Path:
        return self.folder / "reviews"

    @property
    def task(self) -> dict[str, Any]:
        return {**CLASSES, "dataset": str(self.reviews)}


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def unexplained(out: Path) -> list[str]:
    """Stages, but the student, whose names the report does not explain."""
    return [s["name"] for s in read(out)["stages"] if not s["meaning"] and s["name"] != "student"]


def of_model(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in report.items() if k.startswith(start)}


def metrics_of(report: Mapping[str, Any], name: str = "student") -> dict[str, float]:
    return {metric: report[f"{name}.{metric}"] for metric in report["metrics"]}


def records(out: Path, stage: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["stage"] == stage]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders have models of equal weights, bit for bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def logits_by_hand(folder: Path, *texts: list[str]) -> tuple[PreTrainedModel, torch.Tensor]:
    """As anyone would ask a classifier, without megakd's loading and batching; and the model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = AutoTokenizer.from_pretrained(folder)(
        *texts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        return model, model(**encoded).logits


def accuracy_by_hand(model_folder: Path, file: Path) -> float:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    model, logits = logits_by_hand(model_folder, [row["text"] for row in rows])
    names = [model.config.id2label[number] for number in logits.argmax(dim=1).tolist()]
    return sum(name == row["label"] for name, row in zip(names, rows, strict=True)) / len(rows)


def relabelled(model: Path, folder: Path, order: Sequence[int], names: Sequence[str]) -> Path:
    """The classifier with these names of its outputs, which are in the given order."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("checksums.json"))
    made = AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        for parameter in made.classifier.parameters():
            parameter.copy_(parameter[list(order)])
    made.config.id2label = dict(enumerate(names))
    made.config.label2id = {name: number for number, name in enumerate(names)}
    made.save_pretrained(folder)
    return folder


def finish(one_rank: OneRank, config: Path, *overrides: str) -> Outcome:
    return one_rank.train("--config", config, *overrides, code=0)


def finish_in(one_rank: OneRank, folder: Path, task: Mapping[str, Any], **sections: Any) -> Outcome:
    """Write `run.yaml` as `run_in` does, and run it to the end."""
    return finish(one_rank, run_in(folder, task, **sections))


def start_whole_run(one_rank: OneRank, folder: Path) -> WholeRun:
    """A teacher to fine-tune, unlabelled rows, projections, evaluations, saves, a baseline."""
    reviews = write_reviews(folder / "reviews", train=ROWS)
    teacher = _teacher(one_rank, folder, reviews)
    config = run_in(
        folder,
        {**CLASSES, "dataset": str(reviews), "labelled_examples": LABELLED},
        teacher={"model": str(teacher), "finetune": {"learning_rate": 0.003}},
        method={"name": "single"},
        objective=[
            {"loss": "soft_target_kl", "weight": 0.5, "temperature": 2.0},
            {"loss": "hard_cross_entropy", "weight": 0.5},
            {"loss": "hidden_mse", "weight": 0.1, "layer_mapping": ["1:2"]},
        ],
        baselines=["alone"],
        eval={"eval_steps": 6, "latency": False},
        log={"report_to": ["tensorboard"]},
        save={"save_steps": 16},
        train={"gradient_accumulation_steps": 2, "max_steps": None, "num_train_epochs": EPOCHS},
    )
    return WholeRun(folder, teacher, config, finish(one_rank, config))


def _teacher(one_rank: OneRank, folder: Path, reviews: Path) -> Path:
    """A classifier that method finetune makes from random weights."""
    task = {**CLASSES, "dataset": str(reviews)}
    tree = config_tree(folder / "teacher", task, student={"model": bert(2, width=24)})
    tree["train"] |= {"per_device_train_batch_size": 8, "max_steps": 40}
    finish(one_rank, write_config(folder / "teacher.yaml", tree))
    return folder / "teacher" / "final"


def forgotten(
    out: Path, folder: Path, *, stage: str, after: int, following: tuple[str, ...] = ()
) -> Path:
    """A copy of a finished run as a kill would have left it, some steps into a stage.

    The last checkpoint of the stage is that `after` a step; `following` stages had not begun.
    """
    copy = Path(shutil.copytree(out, folder))
    (copy / "report.json").unlink()
    shutil.rmtree(copy / "final")
    for name in (stage, *following):
        shutil.rmtree(copy / "stages" / name)
    for name in following:
        shutil.rmtree(copy / "checkpoints" / name)
    for checkpoint in (copy / "checkpoints" / stage).glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > after:
            shutil.rmtree(checkpoint)
    return copy
