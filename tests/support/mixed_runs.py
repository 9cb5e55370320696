"""Run configs of mixed vocabularies on random words, for teachers with random weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny_runs import bert, config_tree, merged, run_in, write_config

METHOD = {"name": "mixed_vocabulary", "student_vocabulary": 100}
TRAIN = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01}
TEACHER_TOKENIZER = {"type": "wordpiece", "vocab_size": 300}


def words() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(150)]


def mixed(folder: Path, **sections: Any) -> Path:
    """A run config of a teacher with random weights, so that no time goes into its training."""
    text = folder / "text.txt"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, known = random.Random(1), words()
        rows = (" ".join(rng.choices(known, k=rng.randint(3, 30))) for _ in range(100))
        text.write_text("\n\n".join(rows), encoding="utf-8")
    task = {"type": "mlm", "dataset": str(text), "tokenizer": TEACHER_TOKENIZER, "max_length": 24}
    tree = config_tree(
        folder / "out",
        {**task, **sections.pop("task", {})},
        teacher={"model": bert(2, 16), **sections.pop("teacher", {})},
        student={"model": bert(2, 8)},
        method={**METHOD, **sections.pop("method", {})},
        train={**TRAIN, **sections.pop("train", {})},
    )
    return write_config(folder / "run.yaml", merged(tree, sections))


def plain(folder: Path, text: Path) -> Path:
    """A run config of a model of the teacher's shape, trained alone with its own vocabulary."""
    task = {"type": "mlm", "dataset": str(text), "tokenizer": TEACHER_TOKENIZER, "max_length": 24}
    return run_in(folder, task, student={"model": bert(2, 16)}, train=TRAIN)
