"""A student with low-rank adapters learns alike at every ZeRO stage and resumes alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from equal_runs import CLASSIFICATION, LANGUAGE, assert_same, difference, plain_run
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from whole_run import weights

from megakd.models.lora import WEIGHTS

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = {"hard_cross_entropy": 0.3, "soft_target_kl": 0.5, "soft_target_reverse_kl": 0.2}
BEST = ("checkpoints", "student", "best")
ADAPTERS = {"lora": {"r": 4, "alpha": 6.0}}


def adapt(initial, targets=TARGETS, whole=()):
    """student -> the student with the adapters of the run, made by peft without megakd."""

    def adapted(student):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
        inject_adapter_in_model(config, student)
        for module in whole:
            student.get_submodule(module).requires_grad_(requires_grad=True)
        adapters = {n.removeprefix("learners.0."): t for n, t in initial.items() if "lora" in n}
        assert student.load_state_dict(adapters, strict=False).unexpected_keys == []
        return student

    return adapted


@pytest.mark.parametrize(
    ("student", "zero"), [("llama-tied", 0), ("llama-tied", 2), ("llama-untied", 3)]
)
def test_adapters_learn_on_two_ranks_as_in_one_plain_process(distil, student, zero):
    path, (result, _) = distil(student, LANGUAGE, (zero, 0), student=ADAPTERS)

    assert_same(result, plain_run(path, LANGUAGE, result["initial"], adapt(result["initial"])))
    for name, weight in result["initial"].items():
        learns = "lora_" in name or not name.startswith("learners.")
        assert torch.equal(result["final"][name], weight) is not learns, name
        assert ("lora_B" in name) is not bool(weight.any()), name


@pytest.mark.parametrize("zero", [1, 3])
def test_adapters_and_the_head_of_a_classifier_learn_as_in_one_plain_process(distil, zero):
    path, (result, _) = distil("bert-student", CLASSIFICATION, (zero, 3), student=ADAPTERS)

    inside, head = r".*encoder\.layer.*(query|key|value|dense)", ("classifier", "bert.pooler")
    reference = adapt(result["initial"], inside, head)
    assert_same(result, plain_run(path, CLASSIFICATION, result["initial"], reference))


@pytest.mark.parametrize("zero", [2, 3])
def test_the_base_without_adapters_teaches_as_a_second_model_would(distil, write_run, models, zero):
    student, base = {"lora": {**ADAPTERS["lora"], "dropout": 0.0}}, {"model": "student_base"}
    second = write_run("llama-tied", TOKENS, teacher={"model": str(models / "llama-tied")})

    _, (result, _) = distil("llama-tied", TOKENS, (zero, 0), student=student, teacher=base)

    assert_same(result, plain_run(second, TOKENS, result["initial"], adapt(result["initial"])))
    assert abs(result["losses"][0]["soft_target_kl"]) < 1e-6
    assert result["losses"][-1]["soft_target_kl"] > 1e-4


@pytest.mark.parametrize("zero", [1, 3])
def test_a_checkpoint_has_the_adapters_alone(command, write_run, zero):
    train = {"max_steps": 2}
    path = write_run("llama-tied", LANGUAGE, (zero, 0), student=ADAPTERS, train=train)

    command("--config", path, code=0)

    out = Path(f"{path}-out")
    stage, checkpoint = out / "stages" / "student", out / "checkpoints" / "student" / "step-2"
    for file in checkpoint.glob("engine-*.pt"):
        for name in torch.load(file, weights_only=True)["offsets"]:
            assert "lora_" in name or name.startswith("objective."), name
    learned = sum(tensor.numel() for tensor in load_file(stage / WEIGHTS).values())
    assert learned < max(tensor.numel() for tensor in weights(stage).values())
    written = sum(file.stat().st_size for file in checkpoint.glob("*.pt"))
    assert written < 4 * 8 * learned + 200_000, (written, learned)


@pytest.mark.parametrize("zero", [0, 3])
def test_the_adapters_of_the_best_evaluation_are_merged_and_not_the_last(
    command, write_run, models, zero
):
    # Adam's steps are as large as the rate, so the first steps are better than the last.
    train = {"max_steps": 4, "learning_rate": 2.0, "lr_scheduler_type": "constant"}
    sections = {"train": {**train, "adam_epsilon": 1e-8}, "eval": {"eval_steps": 1}}
    path = write_run("llama-untied", LANGUAGE, (zero, 0), student=ADAPTERS, **sections)

    command("--config", path, code=0)

    stage = Path(f"{path}-out", "stages", "student")
    (kept,) = Path(f"{path}-out", *BEST).iterdir()
    best = load_file(kept / Path(WEIGHTS).name)
    assert int(kept.name.removeprefix("step-")) < 4
    assert difference(load_file(stage / WEIGHTS), best) == 0
    assert not (kept / "model.safetensors").exists()
    base, merged = weights(models / "llama-untied"), weights(stage)
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (best.get(f"{module}.lora_{factor}.weight") for factor in "AB")
        expected = weight if a is None else weight + 6 / 4 * b @ a
        assert torch.allclose(merged[name], expected, atol=1e-5, rtol=1e-5), name
