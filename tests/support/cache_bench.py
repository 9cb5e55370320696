"""Runs of one kind that differ in where the teacher's answers come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from one_rank import OneRank
from safetensors.torch import load_file
from tiny_runs import NO_DROPOUT, bert, config_tree, llama, review_task, write_config, write_text
from whole_run import finish

VOCABULARY = 320
KL = [{"loss": "soft_target_kl"}]


class Bench:
    """Data, and runs of one kind that differ in where the answers come from."""

    def __init__(self, one_rank: OneRank, folder: Path, *, language: bool) -> None:
        self.one_rank, self.folder = one_rank, folder
        self.make = llama if language else bert
        if language:
            data = write_text(folder / "text.txt")
            tokenizer = {"type": "bpe", "vocab_size": VOCABULARY}
            self.task = {"type": "causal_lm", "dataset": str(data), "tokenizer": tokenizer}
        else:
            self.task = review_task(folder)
        keys = {} if language else NO_DROPOUT
        # Large weights: a teacher that says the same of every row would hide a wrong row.
        self.models = self.make(2, width=24, initializer_range=0.5, **keys), self.make(1, **keys)

    def config(self, out: str, *, cache: str | None = None, **sections: Any) -> Path:
        big, small = self.models
        teacher = {"model": big, **sections.pop("teacher", {})}
        if cache is not None:
            teacher["cache"] = str(self.folder / cache)
        tree = config_tree(
            self.folder / out,
            self.task | sections.pop("task", {}),
            teacher=teacher,
            student=sections.pop("student", {"model": small}),
            **{"method": {"name": "single"}, "objective": KL, **sections},
        )
        steps = sections.get("train", {}).get("max_steps", 10)
        tree["train"] |= {"max_steps": steps, "adam_epsilon": 0.01}
        return write_config(self.folder / f"{out}.yaml", tree)

    def cache(self, config: Path) -> str:
        outcome = self.one_rank.megakd("cache", config, code=0)
        return outcome.err

    def weights(self, config: Path) -> dict[str, torch.Tensor]:
        finish(self.one_rank, config)
        return load_file(self.folder / config.stem / "final" / "model.safetensors")


def furthest(actual: dict, expected: dict) -> float:
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max().item() for name in actual)
