"""A teacher with linear layers of 8 bits, whole or shared by two ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import started
from equal_runs import LANGUAGE
from safetensors.torch import load_file
from slow_cases import slow

from megakd.engine.sharding import gathered_state
from megakd.losses.objective import logits_of

FP8 = "teacher.dtype=fp8"


def steps(config_path: str, overrides: list[str]) -> dict:
    """The state of a teacher, its answers to the first rows, its bytes here, and two steps."""
    with started(config_path, overrides) as (run, teacher):
        scorer, rows = run.scorer, run.assembly.prepared.encoded.validation
        batch = scorer.collate(rows.select(range(4)).to_list())
        answer = teacher(batch)
        with answer.head.open():
            logits = logits_of(answer)
        weights = [getattr(p, "ds_tensor", p) for p in teacher.model.parameters()]
        losses = [run.trainer.train_step(run.batch_source.step(step)).parts for step in range(2)]
        return {
            "state": dict(gathered_state(teacher.model)),
            "logits": logits.float(),
            "bytes": sum(weight.nbytes for weight in weights),
            "losses": [{name: float(value) for name, value in one.items()} for one in losses],
        }


@pytest.mark.parametrize("stage", [3, *slow(0)])
def test_two_ranks_compute_the_bits_of_one(workers, write_run, stage):
    one = write_run("llama-tied", LANGUAGE, (0, 0))
    two = write_run("llama-tied", LANGUAGE, (0, stage))
    alone = workers(1).run("test_fp8_teacher.steps", one, [FP8])[0]
    ranks = workers(2).run("test_fp8_teacher.steps", two, [FP8])
    exact = workers(1).run("test_fp8_teacher.steps", one, ["teacher.dtype=bf16"])[0]

    for rank in ranks:
        assert torch.equal(rank["logits"], alone["logits"])
    state = ranks[0]["state"]
    assert all(torch.equal(state[name], value) for name, value in alone["state"].items())
    assert ranks[0]["bytes"] < alone["bytes"] * (0.55 if stage == 3 else 1.01)
    # Embeddings are most of this tiny teacher.
    packed = [value for value in state.values() if value.dtype in (torch.uint8, torch.int8)]
    assert len(packed) == 2 * 7 * 4
    layers = sum(v.nbytes for n, v in exact["state"].items() if n.endswith("proj.weight"))
    assert sum(value.nbytes for value in packed) < 0.6 * layers
    difference = (alone["logits"] - exact["logits"]).norm() / exact["logits"].norm()
    assert 0 < difference < 0.2
    for mine, other in zip(alone["losses"], exact["losses"], strict=True):
        assert mine["soft_target_kl"] == pytest.approx(other["soft_target_kl"], rel=0.2)


def test_a_stored_weight_is_rounded_by_the_largest_number_of_its_row(workers, write_run, models):
    path = write_run("llama-tied", LANGUAGE, (0, 0))
    state = workers(1).run("test_fp8_teacher.steps", path, [FP8])[0]["state"]

    name = "model.layers.1.mlp.down_proj"
    stored = load_file(models / "llama-teacher" / "model.safetensors")[f"{name}.weight"]
    scale = state[f"{name}.scale"].view(torch.float32)
    torch.testing.assert_close(scale[:, 0], stored.abs().amax(1) / 448)
    back = state[f"{name}.weight"].view(torch.float8_e4m3fn).float() * scale
    assert (back - stored).abs().max() <= stored.abs().max() / 16


def test_a_run_says_how_far_the_8_bits_are_from_bf16(command, write_run):
    words = ("train.max_steps=1", "eval.eval_steps=null", FP8)
    path = write_run("llama-tied", {"soft_target_kl": 1.0}, (0, 3))

    text = command("--config", path, *words, code=0).text

    (said,) = set(re.findall(r"teacher in fp8: KL divergence from bf16 (\S+) nats", text))
    assert 0 < float(said) < 0.1
    assert Path(f"{path}-out", "final", "config.json").is_file()


def test_a_teacher_that_cannot_have_8_bits_is_refused_before_it_is_loaded(command, write_run):
    path = write_run("llama-tied", {"soft_target_kl": 1.0})
    scratch = "teacher.model={config: {model_type: gpt2, n_embd: 32, n_head: 2, n_layer: 2}}"

    text = command("--config", path, scratch, FP8, code=2).text

    assert "teacher.dtype: fp8 is not supported for new gpt2: it has no stored weights" in text
