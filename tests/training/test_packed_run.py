"""A whole run on rows packed by a token budget, which may change when the run goes on."""

from __future__ import annotations

import pytest
from tiny_runs import llama, write_text
from whole_run import finish, finish_in, forgotten, records


def test_a_run_that_was_killed_may_go_on_with_another_budget(one_rank, tmp_path):
    """Steps of 8 rows of 16 tokens; the last step of every epoch has fewer rows."""
    train = {"per_device_train_batch_size": 8, "max_steps": 12, "gradient_checkpointing": True}
    task = {"type": "causal_lm", "dataset": str(write_text(tmp_path / "stories.txt"))}
    finish_in(
        one_rank,
        tmp_path,
        {**task, "tokenizer": {"type": "bpe", "vocab_size": 320}},
        teacher={"model": llama(2, width=24), "finetune": {"max_steps": 20}},
        student={"model": llama(1), "deepspeed": "zero3"},
        method={"name": "single"},
        objective=[
            {"loss": "soft_target_kl", "weight": 0.5},
            {"loss": "hard_cross_entropy", "weight": 0.5},
            {"loss": "hidden_mse", "weight": 0.1, "layer_mapping": ["1:2"]},
        ],
        eval={"eval_steps": 4},
        save={"save_steps": 4},  # a save ends a window of the log
        train={**train, "tokens_per_rank": 56},
    )
    whole = tmp_path / "out"
    out = forgotten(whole, tmp_path / "killed", stage="student", after=4)
    changed = f"output_dir={out}", "train.tokens_per_rank=32"

    outcome = finish(one_rank, tmp_path / "run.yaml", *changed)

    assert "student: resumed at step 4" in outcome.err
    losses, expected = (
        [r["train/loss"] for r in records(one, "student") if "train/loss" in r]
        for one in (out, whole)
    )
    assert losses == pytest.approx(expected, rel=1e-4)
