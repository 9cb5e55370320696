"""Experts that a checkpoint stores one by one make one tensor of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megakd.errors import ModelError
from megakd.models.fitting import with_joint_experts
from megakd.models.weights import StoredExperts, StoredTensor, WeightReader

PATH = "model.layers.0.mlp.experts"


@pytest.fixture
def folder(tiny) -> Path:
    return tiny.save("qwen3_moe")


def changed(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_transformers_stores_one_tensor_per_expert_and_the_model_has_one_for_all(tiny, folder):
    names = load_file(folder / "model.safetensors").keys()
    model = tiny.load(folder, tiny.task("causal_lm"))
    assert f"{PATH}.3.gate_proj.weight" in names
    assert f"{PATH}.gate_up_proj" not in names
    assert model.get_parameter(f"{PATH}.gate_up_proj").shape == (4, 64, 16)


def test_the_gate_of_an_expert_comes_before_its_neurons(tiny, folder):
    stored = load_file(folder / "model.safetensors")
    model = tiny.load(folder, tiny.task("causal_lm"))
    for number in range(4):
        parts = [stored[f"{PATH}.{number}.{name}_proj.weight"] for name in ("gate", "up")]
        assert torch.equal(model.get_parameter(f"{PATH}.gate_up_proj")[number], torch.cat(parts))


@pytest.mark.parametrize("missing", ["1.up_proj", "0.down_proj", "2.gate_proj"])
def test_an_expert_that_lacks_a_part_is_a_missing_weight(tiny, folder, missing):
    changed(folder, lambda tensors: tensors.pop(f"{PATH}.{missing}.weight"))
    with pytest.raises(ModelError, match=r"lacks 1 weights of a qwen3_moe model \(model.layers.0"):
        tiny.load(folder, tiny.task("causal_lm"))


def test_fewer_experts_than_the_config_says_are_an_error_with_both_numbers(tiny, folder):
    def drop_last(tensors):
        for name in ("gate_proj", "up_proj", "down_proj"):
            del tensors[f"{PATH}.3.{name}.weight"]

    changed(folder, drop_last)

    with pytest.raises(ModelError, match=r"of shape \[3, .*config.json requires \[4, "):
        tiny.load(folder, tiny.task("causal_lm"))


def test_experts_are_read_from_several_files(tmp_path):
    matrices, parts = torch.arange(12.0).reshape(2, 2, 3), []
    for number, matrix in enumerate(matrices):
        file = tmp_path / f"{number}.safetensors"
        save_file({"w": matrix}, file)
        parts.append(
            StoredTensor(
                file=file,
                key="w",
                shape=(2, 3),
                dtype=torch.float32,
                offset=file.stat().st_size - 24,
            )
        )
    stored = {f"{PATH}.{n}.down_proj.weight": part for n, part in enumerate(parts)}

    joint = with_joint_experts(stored, {f"{PATH}.down_proj"})[f"{PATH}.down_proj"]

    assert isinstance(joint, StoredExperts)
    assert torch.equal(WeightReader("teacher.model").read(joint), matrices)
