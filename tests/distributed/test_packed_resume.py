"""Two ranks that are killed in a stage with packed rows end with the weights they would have."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import config_tree, llama, write_config, write_text

STEPS = 12


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Steps of 12 rows of at most 16 tokens, in micro-batches of at most 40 tokens."""
    folder = tmp_path_factory.mktemp("packed")
    tree = config_tree(
        folder / "out",
        {
            "type": "causal_lm",
            "dataset": str(write_text(folder / "stories.txt")),
            "tokenizer": {"type": "bpe", "vocab_size": 320},
        },
        teacher={"model": llama(2), "deepspeed": "teacher_zero3"},
        student={"model": llama(1), "deepspeed": "zero2"},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy"}],
        save={"save_steps": 2},
    )
    tree["train"] |= {
        "per_device_train_batch_size": 6,
        "max_steps": STEPS,
        "tokens_per_rank": 40,
    }
    return write_config(folder / "run.yaml", tree)


@pytest.mark.slow
def test_killed_ranks_end_with_the_weights_they_would_have(launch, config, tmp_path):
    truth, killed = tmp_path / "truth", tmp_path / "killed"
    whole = launch("--config", str(config), f"output_dir={truth}")
    assert whole.wait() == [0, 0], whole.text

    begun = launch("--config", str(config), f"output_dir={killed}")
    checkpoint = killed / "checkpoints" / "student" / "step-6"
    assert begun.wait_until(checkpoint.exists), begun.text
    begun.kill()
    assert not (killed / "final").exists()
    again = launch("--config", str(config), f"output_dir={killed}")

    assert again.wait() == [0, 0], again.text
    assert "student: resumed at step" in again.text
    weights = "final/model.safetensors"
    assert (killed / weights).read_bytes() == (truth / weights).read_bytes()
