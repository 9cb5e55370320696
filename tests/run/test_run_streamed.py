"""Whole runs on a stream of texts: learned, stopped, resumed with the same weights, refused."""

from __future__ import annotations

import random
from pathlib import Path

from tiny_runs import SENTENCES, bert, config_tree, save_tokenizer, write_config, write_jsonl
from whole_run import finish, read, records, same_weights

OUTS = ("whole", "stopped")


def rows(count: int, seed: str) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"text": ". ".join(rng.choices(SENTENCES, k=rng.randint(1, 9)))} for _ in range(count)]


def write_run(folder: Path, out: str) -> Path:
    """A teacher and a student from scratch on two streamed files that are read more than once."""
    for number in range(2):
        write_jsonl(folder / f"shard-{number}.jsonl", rows(9, f"{number}"))
    tokenizer = save_tokenizer(folder / "tokenizer", SENTENCES, kind="wordpiece")
    held = write_jsonl(folder / "held.jsonl", rows(8, "held"))
    tree = config_tree(
        folder / out,
        {
            "type": "mlm",
            "train_files": str(folder / "shard-*.jsonl"),
            "validation_files": str(held),
            "tokenizer": str(tokenizer),
            "streaming": True,
            "whole_word_masking": True,
        },
        teacher={"model": bert(1, width=24), "finetune": {"max_steps": 3}},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy"}],
        eval={"eval_steps": 4},
        save={"save_steps": 5},
        train={"max_steps": 12, "gradient_accumulation_steps": 2},
    )
    return write_config(folder / f"{out}.yaml", tree)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(one_rank, tmp_path):
    whole = finish(one_rank, write_run(tmp_path, "whole"))
    config = write_run(tmp_path, "stopped")
    stopped = one_rank.train("--config", config, stop_at=("student", 7))
    assert stopped.code != 0
    finish(one_rank, config)

    assert same_weights(*(tmp_path / out / "final" for out in OUTS))
    metrics = [read(tmp_path / out)["student"]["metrics"] for out in OUTS]
    assert metrics[0] == metrics[1]
    other = one_rank.train("--config", config, "task.whole_word_masking=false")
    assert other.code != 0
    assert "task.whole_word_masking" in other.err
    assert "rank 0 has read its texts 1 time(s) and starts again" in whole.err
    logged = [r["train/loss"] for r in records(tmp_path / "whole", "student") if "train/loss" in r]
    assert logged[-1] < logged[0]
