"""A whole run on rows packed by a token budget: learned, scored, resumed, in the result folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import llama, write_text
from whole_run import finish, finish_in, forgotten, records

STEPS, BUDGET = 12, 56


@pytest.fixture(scope="module")
def packed_run(one_rank, tmp_path_factory) -> Path:
    """Steps of 8 rows of 16 tokens; the last step of every epoch has fewer rows."""
    folder = tmp_path_factory.mktemp("packed")
    train = {"per_device_train_batch_size": 8, "max_steps": STEPS, "gradient_checkpointing": True}
    finish_in(
        one_rank,
        folder,
        {
            "type": "causal_lm",
            "dataset": str(write_text(folder / "stories.txt")),
            "tokenizer": {"type": "bpe", "vocab_size": 320},
        },
        teacher={"model": llama(2, width=24), "finetune": {"max_steps": 20}},
        student={"model": llama(1), "deepspeed": "zero3"},
        method={"name": "single"},
        objective=[
            {"loss": "soft_target_kl", "weight": 0.5},
            {"loss": "hard_cross_entropy", "weight": 0.5},
            {"loss": "hidden_mse", "weight": 0.1, "layer_mapping": ["1:2"]},
        ],
        eval={"eval_steps": 4},
        save={"save_steps": 5},
        train={**train, "tokens_per_rank": BUDGET},
    )
    return folder


def logged(out: Path) -> list[dict[str, Any]]:
    return [record for record in records(out, "student") if "train/loss" in record]


def test_padded_rows_give_the_same_weights_up_to_rounding(one_rank, packed_run, tmp_path):
    teacher = packed_run / "out" / "stages" / "teacher-finetune"
    settings = (f"teacher.model={teacher}", "teacher.finetune=null", f"output_dir={tmp_path}")
    finish(one_rank, packed_run / "run.yaml", *settings, "train.tokens_per_rank=null")

    for packed, padded in zip(logged(packed_run / "out"), logged(tmp_path), strict=True):
        for name, tolerance in {"train/loss": 1e-4, "train/gradient_norm": 1e-3}.items():
            assert packed[name] == pytest.approx(padded[name], rel=tolerance)


def test_a_run_that_was_killed_ends_with_the_weights_it_would_have(one_rank, packed_run, tmp_path):
    out = forgotten(packed_run / "out", tmp_path / "killed", stage="student", after=10)

    outcome = finish(one_rank, packed_run / "run.yaml", f"output_dir={out}")

    assert "student: resumed at step 10" in outcome.err
    weights = "final/model.safetensors"
    assert (out / weights).read_bytes() == (packed_run / "out" / weights).read_bytes()


def test_a_run_may_go_on_with_another_budget(one_rank, packed_run, tmp_path):
    out = forgotten(packed_run / "out", tmp_path / "other", stage="student", after=5)
    changed = f"output_dir={out}", "train.tokens_per_rank=32"

    outcome = finish(one_rank, packed_run / "run.yaml", *changed)

    assert "student: resumed at step 5" in outcome.err
    result, whole = ([r["train/loss"] for r in logged(o)] for o in (out, packed_run / "out"))
    assert result == pytest.approx(whole, rel=1e-4)
