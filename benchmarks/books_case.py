"""Eleven novels, and a Llama of 1.5 million weights that learns them from random weights.

The Llama is trained once, by the method `finetune`, and is then the teacher of other runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launching import write_config
from legs import Leg, report_of

BOOKS = Path("lm/standard-ebooks")
PARTS = (BOOKS,)
TEACHER = Path("runs/bench/shrink/books-teacher")
LAYERS = 6
SHAPE = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
TRAIN = {"per_device_train_batch_size": 4, "learning_rate": 2e-3, "warmup_ratio": 0.02}


def train_books_teacher(data: Path, folder: Path, *, jobs: int) -> None:
    """Train the teacher in a folder, unless it is trained.

    Raises:
        RunFailedError: the training failed.
    """
    config = folder.parent / "configs" / f"{folder.name}.yaml"
    write_config(config, teacher_config(data, folder))
    report_of(Leg(folder.name, config, folder, ()), ranks=1, jobs=jobs)


def teacher_config(data: Path, folder: Path) -> dict[str, Any]:
    """Return the run that trains the teacher on 2.5 million tokens."""
    return {
        "output_dir": str(folder),
        "task": {
            **_text(data),
            "tokenizer": {"type": "bpe", "vocab_size": 3000},
            "max_eval_examples": 64,
        },
        "student": {"model": {"config": SHAPE}, "deepspeed": "zero0"},
        "method": {"name": "finetune"},
        "train": {
            "per_device_train_batch_size": 8,
            "max_steps": 1200,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
        },
        "eval": {"eval_steps": 300},
        "save": {"save_steps": 300},
        "log": {"logging_steps": 50},
    }


def books_task(data: Path) -> dict[str, Any]:
    """Return the section `task`, with rows held out that the teacher has not learned.

    The 8 held-out pieces of about 8,000 characters are some of those that scored the teacher.
    """
    return {**_text(data), "max_eval_examples": 8}


def books_teacher(folder: Path) -> dict[str, Any]:
    """Return the section `teacher`; its tokenizer is the run's."""
    return {"model": str(folder / "final"), "deepspeed": "teacher_zero0"}


def _text(data: Path) -> dict[str, Any]:
    return {"type": "causal_lm", "dataset": str(data / BOOKS), "max_length": 256}
