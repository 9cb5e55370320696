"""The run that the overhead is measured on: BERT-shaped models and texts of one length."""

from __future__ import annotations

import csv
import random
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

TEMPERATURE = 2.0
WEIGHTS = {"soft_target_kl": 0.5, "hard_cross_entropy": 0.5}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = ("bad", "fair", "good")
TRAINING_ROWS = 4096


def write_case(folder: Path, given: argparse.Namespace) -> None:
    """Texts, a vocabulary and run.yaml."""
    words = [f"w{number:06d}" for number in range(given.vocabulary - len(SPECIAL))]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")
    data = folder / "data"
    data.mkdir()
    rng = random.Random(0)
    for split, count in (("train", TRAINING_ROWS), ("validation", 32)):
        with (data / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for _ in range(count):
                # With the two special tokens, a row has as many tokens as the case says.
                text = " ".join(rng.choices(words, k=given.length - 2))
                writer.writerow((text, rng.choice(LABELS)))
    config = yaml.safe_dump(case_config(folder, given), sort_keys=False)
    (folder / "run.yaml").write_text(config, encoding="utf-8")


def case_config(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The run config: the quickstart's engines, no evaluation and no save within reach."""
    temperature = {"temperature": TEMPERATURE}
    return {
        "output_dir": str(folder / "run"),
        "task": {
            "type": "classification",
            "dataset": str(folder / "data"),
            "text_columns": ["text"],
            "label_column": "label",
            "max_length": given.length,
            "tokenizer": str(folder / "tokenizer"),
        },
        "teacher": {"model": bert(given.teacher), "deepspeed": given.teacher_deepspeed},
        "student": {"model": bert(given.student), "deepspeed": given.deepspeed},
        "method": {"name": "single"},
        "objective": [
            {"loss": "soft_target_kl", "weight": WEIGHTS["soft_target_kl"], **temperature},
            {"loss": "hard_cross_entropy", "weight": WEIGHTS["hard_cross_entropy"]},
        ],
        "train": {
            "per_device_train_batch_size": given.rows,
            "max_steps": 10**6,
            "learning_rate": 1e-4,
        },
        "save": {"save_steps": 10**6},
        "log": {"logging_steps": 10},
    }


def bert(size: str) -> dict[str, Any]:
    """A BERT from scratch; `6x384` is 6 layers of width 384, heads of 32."""
    layers, width = (int(number) for number in size.split("x"))
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    others = {"num_attention_heads": max(1, width // 32), "num_labels": len(LABELS)}
    return {"config": {"model_type": "bert", **sizes, **others}}
