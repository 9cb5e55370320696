"""Whole runs on a stream of texts: learned, stopped, resumed with the same weights, refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import SENTENCES, bert, config_tree, llama, save_tokenizer, write_config, write_jsonl
from whole_run import finish, read, records

OUTS = ("whole", "stopped")


def rows(count: int, seed: str) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"text": ". ".join(rng.choices(SENTENCES, k=rng.randint(1, 9)))} for _ in range(count)]


def write_run(folder: Path, kind: str, out: str, **task: Any) -> Path:
    """A teacher and a student from scratch on two streamed files that are read more than once."""
    for number in range(2):
        write_jsonl(folder / f"shard-{number}.jsonl", rows(9, f"{number}"))
    is_mlm = kind == "mlm"
    pieces = "wordpiece" if is_mlm else "bpe"
    tokenizer = save_tokenizer(folder / "tokenizer", SENTENCES, kind=pieces)
    held = write_jsonl(folder / "held.jsonl", rows(8, "held"))
    model = bert if is_mlm else llama
    tree = config_tree(
        folder / out,
        {
            "type": kind,
            "train_files": str(folder / "shard-*.jsonl"),
            "validation_files": str(held),
            "tokenizer": str(tokenizer),
            "streaming": True,
            **({"whole_word_masking": True} if is_mlm else {}),
            **task,
        },
        teacher={"model": model(1, width=24), "finetune": {"max_steps": 3}},
        student={"model": model(1)},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy"}],
        eval={"eval_steps": 4},
        save={"save_steps": 5},
    )
    tree["train"] |= {"max_steps": 12, "gradient_accumulation_steps": 2}
    return write_config(folder / f"{out}.yaml", tree)


@pytest.mark.parametrize("kind", ["mlm", "causal_lm"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(one_rank, tmp_path, kind):
    whole = finish(one_rank, write_run(tmp_path, kind, "whole"))
    config = write_run(tmp_path, kind, "stopped")
    stopped = one_rank.train("--config", config, stop_at=("student", 7))
    assert stopped.code != 0
    finish(one_rank, config)

    weights = [load_file(tmp_path / out / "final/model.safetensors") for out in OUTS]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    metrics = [read(tmp_path / out)["student"]["metrics"] for out in OUTS]
    assert metrics[0] == metrics[1]
    if kind == "mlm":
        other = one_rank.train("--config", config, "task.whole_word_masking=false")
        assert other.code != 0
        assert "task.whole_word_masking" in other.err
    assert "rank 0 has read its texts 1 time(s) and starts again" in whole.err
    logged = [r["train/loss"] for r in records(tmp_path / "whole", "student") if "train/loss" in r]
    assert logged[-1] < logged[0]
