"""A student with low-rank adapters learns alike at every ZeRO stage and resumes alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from equal_runs import (
    CLASSIFICATION,
    LANGUAGE,
    STEPS,
    assert_same,
    config_tree,
    plain_run,
    write,
    write_folder,
)
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megakd.models.lora import ADAPTER, WEIGHTS

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("lora"))


def adapted_tree(folder, student, *, zero):
    tree = config_tree(folder, student, LANGUAGE, student_zero=zero, teacher_zero=0)
    tree["student"]["lora"] = {"r": 4, "alpha": 6.0}
    return tree


def adapt(initial, targets=TARGETS, whole=()):
    """student -> the student with the adapters of the run, made by peft without megakd."""

    def adapted(student):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
        inject_adapter_in_model(config, student)
        for module in whole:
            student.get_submodule(module).requires_grad_(requires_grad=True)
        own = {n.removeprefix("learners.0."): t for n, t in initial.items() if "lora" in n}
        assert student.load_state_dict(own, strict=False).unexpected_keys == []
        return student

    return adapted


@pytest.mark.parametrize(
    ("student", "zero"), [("llama-tied", zero) for zero in range(4)] + [("llama-untied", 3)]
)
def test_adapters_learn_on_two_ranks_as_in_one_plain_process(
    workers, folder, tmp_path, student, zero
):
    path = write(adapted_tree(folder, student, zero=zero), tmp_path / "config.yaml")

    found = workers(2).run("train", path, [], STEPS)[0]

    expected = plain_run(path, LANGUAGE, found["initial"], adapt(found["initial"]))
    assert_same(found, expected)
    for name, weight in found["initial"].items():
        learns = "lora_" in name or not name.startswith("learners.")
        assert torch.equal(found["final"][name], weight) is not learns, name
        assert ("lora_B" in name) is not bool(weight.any()), name


@pytest.mark.parametrize("zero", [1, 3])
def test_adapters_and_the_head_of_a_classifier_learn_as_in_one_plain_process(
    workers, folder, tmp_path, zero
):
    tree = config_tree(folder, "bert-student", CLASSIFICATION, student_zero=zero, teacher_zero=3)
    tree["student"]["lora"] = {"r": 4, "alpha": 6.0}
    path = write(tree, tmp_path / "config.yaml")

    found = workers(2).run("train", path, [], STEPS)[0]

    inside, head = r".*encoder\.layer.*(query|key|value|dense)", ("classifier", "bert.pooler")
    reference = adapt(found["initial"], inside, head)
    assert_same(found, plain_run(path, CLASSIFICATION, found["initial"], reference))


TOKENS = {"hard_cross_entropy": 0.3, "soft_target_kl": 0.5, "soft_target_reverse_kl": 0.2}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_base_without_adapters_teaches_as_a_second_model_would(workers, folder, tmp_path, zero):
    tree = config_tree(folder, "llama-tied", TOKENS, student_zero=zero, teacher_zero=0)
    tree["student"]["lora"] = {"r": 4, "alpha": 6.0, "dropout": 0.0}
    tree["teacher"] = {"model": "student_base"}
    path = write(tree, tmp_path / "base.yaml")
    tree["teacher"] = {"model": str(folder / "llama-tied")}
    second = write(tree, tmp_path / "second.yaml")

    found = workers(2).run("train", path, [], STEPS)[0]

    expected = plain_run(second, TOKENS, found["initial"], adapt(found["initial"]))
    assert_same(found, expected)
    assert abs(found["losses"][0]["soft_target_kl"]) < 1e-6
    assert found["losses"][-1]["soft_target_kl"] > 1e-4


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def finished(request, workers, folder, tmp_path_factory):
    """The config file and the finished stage of a run on two ranks that saves at every step."""
    out = tmp_path_factory.mktemp("finished")
    tree = adapted_tree(folder, "llama-tied", zero=request.param)
    tree |= {"output_dir": str(out / "out"), "save": {"save_steps": 2, "save_total_limit": None}}
    tree["train"]["max_steps"] = 4
    path = write(tree, out / "config.yaml")
    workers(2).run("lora_cases.finish", path, [])
    return path, out / "out"


def tensors_of(folder):
    return {
        (file.name, name): tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_a_killed_run_resumes_from_the_adapters_to_the_same_weights(workers, finished, tmp_path):
    path, out = finished
    killed = tmp_path / "killed"
    shutil.copytree(out / "checkpoints", killed / "checkpoints")
    shutil.rmtree(killed / "checkpoints" / "student" / "step-4")
    (killed / "checkpoints" / "student" / "latest").unlink()

    workers(2).run("lora_cases.finish", path, [f"output_dir={killed}"])

    found, expected = (tensors_of(at / "stages" / "student") for at in (killed, out))
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    result = json.loads((killed / "stages" / "student" / "result.json").read_text())
    assert result["steps"] == 4


def test_a_checkpoint_holds_the_adapters_and_none_of_the_frozen_weights(finished):
    _, out = finished
    checkpoint = out / "checkpoints" / "student" / "step-2"
    largest = max(tensor.numel() for tensor in tensors_of(out / "stages" / "student").values())

    for file in checkpoint.glob("*.pt"):
        state = torch.load(file, weights_only=False)
        assert not state.get("frozen_param_fragments"), file.name
        for name in state.get("module", {}):
            assert "lora_" in name or name.startswith("objective."), name
    adapters = load_file(out / "stages" / "student" / WEIGHTS)
    learned = sum(tensor.numel() for tensor in adapters.values())
    assert learned < largest
    written = sum(file.stat().st_size for file in checkpoint.glob("*.pt"))
    assert written < 4 * 8 * learned + 200_000, (written, learned)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_merged_model_is_the_base_with_its_adapters(finished, folder):
    _, out = finished
    stage = out / "stages" / "student"
    ids = torch.arange(3, 19).reshape(2, 8)
    merged = AutoModelForCausalLM.from_pretrained(stage)
    base = AutoModelForCausalLM.from_pretrained(folder / "llama-tied")
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, stage / ADAPTER).eval()
        logits, expected = merged(ids).logits, adapted(ids).logits

    assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, before, atol=1e-2)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_adapters_of_the_best_evaluation_are_merged_and_not_the_last(
    workers, folder, tmp_path, zero
):
    tree = adapted_tree(folder, "llama-untied", zero=zero)
    tree |= {"output_dir": str(tmp_path / "out"), "eval": {"eval_steps": 1}}
    # Adam's steps are as large as the rate, so the first steps are better than the last.
    tree["train"] |= {"max_steps": 4, "learning_rate": 2.0, "lr_scheduler_type": "constant"}
    tree["train"] |= {"adam_epsilon": 1e-8}
    workers(2).run("lora_cases.finish", write(tree, tmp_path / "config.yaml"), [])
    stage, checkpoints = (tmp_path / "out" / part / "student" for part in ("stages", "checkpoints"))

    best, found = load_file(checkpoints / "best" / Path(WEIGHTS).name), load_file(stage / WEIGHTS)

    assert json.loads((checkpoints / "best" / "best.json").read_text())["step"] < 4
    assert found.keys() == best.keys()
    assert all(torch.equal(found[name], best[name]) for name in best)
    assert not (checkpoints / "best" / "model.safetensors").exists()
    base = load_file(folder / "llama-untied" / "model.safetensors")
    merged = load_file(stage / "model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    a, b = (best[f"base_model.model.{layer}.lora_{factor}.weight"] for factor in "AB")
    expected = base[f"{layer}.weight"] + 6 / 4 * b @ a
    assert torch.allclose(merged[f"{layer}.weight"], expected, atol=1e-5, rtol=1e-5)
    assert merged.keys() == base.keys()
