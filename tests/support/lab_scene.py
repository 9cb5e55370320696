"""A lab of one rank with tiny models, and without data, engines or a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from megakd.config.run import RunConfig
from megakd.config.sections import ScratchModel, StudentConfig, TeacherConfig
from megakd.config.task import TaskConfig
from megakd.config.terms import SoftTargetKl
from megakd.data.conversations import ChatColumns
from megakd.data.encoding import Encoded
from megakd.data.rows import RowKind
from megakd.data.splits import Splits
from megakd.engine import distributed
from megakd.engine.distributed import Ranks
from megakd.methods.single import SingleConfig
from megakd.models.loading import resolve_model
from megakd.run.run_work import RunWork
from megakd.stage import Stage
from megakd.training.inputs import RunInputs
from megakd.training.lab import Lab
from megakd.training.metrics import TaskMetrics, headline

SIZE = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 40,
}
ONE_RANK = Ranks(0, 1, 0, torch.device("cpu"))


def pretend_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)


def save_teacher(folder: Path) -> Path:
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZE, id2label={0: "no", 1: "yes"})).save_pretrained(
        folder
    )
    return folder


def config_of(tmp_path: Path, **sections: Any) -> RunConfig:
    config = {"model_type": "bert", **SIZE, "num_hidden_layers": 1}
    defaults: dict[str, Any] = {
        "output_dir": tmp_path / "run",
        "task": TaskConfig(type="classification", dataset="d", max_length=32),
        "student": StudentConfig(model=ScratchModel(config=config)),
        "teacher": TeacherConfig(model=str(tmp_path / "teacher")),
        "method": SingleConfig(name="single"),
    }
    return RunConfig(**(defaults | sections))


class Vocabulary(dict[str, int]):
    """All that is asked of a tokenizer here."""

    def get_vocab(self) -> dict[str, int]:
        return self


KIND = RowKind("classification", ChatColumns(text=("text",), label="label"))


def prepared_of(config: RunConfig, content: str = "rows", rows: Any = None) -> RunInputs:
    nothing: Any = None
    specs = {**config.teacher_specs, "student": config.student}
    tokenizer: Any = Vocabulary({str(number): number for number in range(20)})
    return RunInputs(
        config=config,
        splits=Splits(
            Dataset.from_dict({}), nothing, None, ("no", "yes"), ("accuracy",), content, KIND
        ),
        metrics=TaskMetrics(names=("accuracy",), main=headline(["accuracy"])),
        encoded=Encoded(rows, rows, None, content, 8.0),
        tokenizer=tokenizer,
        sources={
            role: resolve_model(spec.model, config.task, where=f"{role}.model")
            for role, spec in specs.items()
        },
    )


def lab_of(config: RunConfig, content: str = "rows", rows: Any = None) -> Lab[RunWork]:
    """`rows` are those of the training, and those that are held out."""
    reporter: Any = None
    return Lab(RunWork(prepared_of(config, content, rows), ONE_RANK, reporter))


def stage_of(**changes: Any) -> Stage:
    kl = SoftTargetKl(loss="soft_target_kl")
    return Stage(**{"name": "student", "teachers": ("teacher",), "objective": (kl,), **changes})
