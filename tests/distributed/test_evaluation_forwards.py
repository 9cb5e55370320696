"""Evaluations on one and two ranks: one forward of each model, and the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from equal_runs import ZERO3
from tiny_runs import config_tree, llama, save_tokenizer, write_config, write_text
from transformers import AutoConfig, AutoModelForCausalLM

ROWS = 5
"""Rows of an evaluation's micro-batch; a training step has others."""
PRESETS = {2: ("zero2", "teacher_zero0"), 3: (ZERO3, "teacher_zero3")}
TERMS = ("hard_cross_entropy", "soft_target_kl", "hidden_mse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text, and a Llama with random weights."""
    folder = tmp_path_factory.mktemp("evaluation")
    text = write_text(folder / "text.txt", documents=120)
    torch.manual_seed(0)
    keys = llama(2, intermediate_size=16, num_attention_heads=4, num_key_value_heads=2)["config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=320, **keys))
    model.save_pretrained(folder / "llama")
    save_tokenizer(folder / "llama", text.read_text().split("\n\n"), kind="bpe")
    return folder


def config_of(folder: Path, out: Path, *, zero: int) -> Path:
    student, teacher = PRESETS[zero]
    tree = config_tree(
        out / "out",
        {"type": "causal_lm", "dataset": str(folder / "text.txt")},
        teacher={"model": str(folder / "llama"), "deepspeed": teacher},
        train={"per_device_train_batch_size": 3, "max_steps": 1},
        eval={"per_device_eval_batch_size": ROWS},
    )
    tree["student"] = {"model": "from_teacher", "deepspeed": student}
    tree["method"] = {"name": "minidisc"}
    tree["objective"] = [{"loss": term} for term in TERMS]
    return write_config(out / "run.yaml", tree)


@pytest.mark.parametrize(("ranks", "zero"), [(1, 2), (2, 2), (2, 3)])
def test_a_trial_asks_the_teacher_once_and_runs_each_candidate_once(
    workers, folder, tmp_path, ranks, zero
):
    config = config_of(folder, tmp_path, zero=zero)

    for found in workers(ranks).run("evaluation_cases.evaluated", str(config), [], "trial"):
        turns = found["batches"]  # before the first step and after the last
        assert found["forwards"]["teacher", ROWS] == 2 * turns
        assert found["forwards"]["student", ROWS] == 2 * 3 * turns
        for view, scores in found["scores"].items():
            assert scores.keys() >= {"perplexity", *TERMS}, view
            assert scores == pytest.approx(found["apart"][view], rel=1e-6), view


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_on_held_out_rows_take_no_second_forward(workers, folder, tmp_path, ranks):
    config = config_of(folder, tmp_path, zero=2)

    for losses in (False, True):
        overrides = [f"eval.losses={str(losses).lower()}", f"output_dir={tmp_path / str(losses)}"]
        for found in workers(ranks).run(
            "evaluation_cases.evaluated", str(config), overrides, "plain"
        ):
            turns = found["batches"]
            (scores,), (apart,) = found["scores"].values(), found["apart"].values()
            assert found["forwards"].get(("teacher", ROWS), 0) == losses * 2 * turns
            assert found["forwards"]["student", ROWS] == (1 + losses) * turns
            assert set(TERMS) <= scores.keys() if losses else not set(TERMS) & scores.keys()
            assert scores == pytest.approx({n: apart[n] for n in scores}, rel=1e-6)
