"""TinyStories and the Llama of 260,000 weights that the author of llama2.c pretrained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stories_tokenizer import write_tokenizer

STORIES = Path("lm/tinystories_sample/tinystories_1000.json")
MODEL = Path("weights/stories260K")
PARTS = (STORIES, MODEL)
LAYERS = 5
TRAIN = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "warmup_ratio": 0.02}


def write_stories_tokenizer(data: Path, out: Path) -> None:
    """Write the tokenizer of the Llama below the folder of a benchmark, for transformers."""
    write_tokenizer(data / MODEL / "tok512.bin", tokenizer(out))


def tokenizer(out: Path) -> Path:
    """Return the folder of the tokenizer."""
    return out / "tokenizer"


def stories_task(data: Path, out: Path) -> dict[str, Any]:
    """Return the section `task`: all stories in rows of 256 tokens, of which 5 % are held out."""
    return {
        "type": "causal_lm",
        "dataset": str(data / STORIES),
        "text_columns": ["text"],
        "max_length": 256,
        "tokenizer": str(tokenizer(out)),
        "max_eval_examples": 16,
    }


def stories_teacher(data: Path) -> dict[str, Any]:
    """Return the section `teacher`."""
    return {"model": str(data / MODEL / "hf"), "deepspeed": "teacher_zero0"}
