"""Settings that cannot be combined with `train.tokens_per_rank` are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import message_of

from megakd.config.file import load_config

TEXT = """
output_dir: runs/x
task: {type: causal_lm, dataset: pydocs, max_length: 64}
teacher: {model: teacher}
student: {model: student}
method: {name: single}
objective:
  - {loss: soft_target_kl}
  - {loss: hidden_mse}
train: {per_device_train_batch_size: 32, tokens_per_rank: 256}
"""


@pytest.fixture
def path(tmp_path) -> Path:
    found = tmp_path / "run.yaml"
    found.write_text(TEXT)
    return found


def test_a_budget_is_accepted_and_inherited(path):
    config = load_config(path, ["teacher.finetune={max_steps: 3}"])

    assert config.train.tokens_per_rank == 256


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.tokens_per_rank=63", "train.tokens_per_rank: 63 is less than task.max_length 64"),
        ("task.type=mlm", "train.tokens_per_rank: supported only for causal_lm"),
        ("teacher.cache=answers", "teacher.cache: holds one answer per training row, and train."),
        ("objective.1.positions=first", "objective[1].loss: hidden_mse is averaged over rows"),
        ("objective.1.loss=relation_fsp", "objective[1].loss: relation_fsp is averaged over rows"),
        ("task.streaming=true", "train.tokens_per_rank: packs the rows of all ranks together"),
        ("train.tokens_per_rank=7", "train.tokens_per_rank"),
    ],
)
def test_what_needs_a_text_per_row_is_refused(path, override, message):
    assert message in message_of(path, override)


def test_a_problem_of_an_inherited_budget_is_told_once(path):
    message = message_of(path, "task.max_length=512", "teacher.finetune={max_steps: 3}")

    assert message.count("is less than task.max_length 512") == 1


def test_a_budget_of_a_fine_tuning_is_checked_with_its_own_key(path):
    message = message_of(path, "teacher.finetune={max_steps: 3, tokens_per_rank: 32}")

    assert "teacher.finetune.tokens_per_rank: 32 is less than task.max_length 64" in message


def test_models_are_scored_on_as_many_rows_as_fit_into_the_budget(path):
    config = load_config(path)

    assert config.eval_rows() == 4
    assert load_config(path, ["train.tokens_per_rank=4096"]).eval_rows() == 32
    assert load_config(path, ["eval.per_device_eval_batch_size=9"]).eval_rows() == 9


def test_offloaded_activations_need_gradient_checkpointing(path):
    message = message_of(path, "train.activation_offload=true")

    assert "train.activation_offload: moves the inputs of checkpointed layers" in message
    load_config(path, ["train.activation_offload=true", "train.gradient_checkpointing=true"])
