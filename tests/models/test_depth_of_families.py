"""Layers left out of models of any family: written by megakd, opened by transformers' own class.

The models have four layers, of which the first and the last stay. Either the folder computes what
the whole model computes while the other layers are passed by, or the cut is refused.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_cuts import reshaped
from tiny_families import SMALL, TYPES, build, small_config
from torch import Tensor
from transformers import CONFIG_MAPPING

from megakd.config.task import TaskConfig, TaskType
from megakd.errors import ModelError
from megakd.models.architectures import AUTO_CLASSES
from megakd.models.cutting import content_of
from megakd.models.fitting import ModelSource
from megakd.models.layers import config_with_layers, left_out, with_layers
from megakd.models.loading import load_model, resolve_model
from megakd.models.model_folder import write_model_folder
from megakd.models.small_copy import logits_of
from megakd.models.structure import architecture_of
from megakd.training.facts import RunFacts

LAYERS, STAY, SHARING = 4, (1, 4), (1, 3, 4)
TOKENS = 5 + torch.arange(48).reshape(2, 24) * 11 % 500
KEY = "student.layers"
DECODERS = """apertus arcee bloom cohere cohere2 exaone4 falcon gemma glm glm4 gpt_bigcode gpt_neox
granite helium hunyuan_v1_dense jais2 lfm2 llama4_text mamba ministral3 mixtral nanochat nemotron
minicpm3 nemotron_h olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt phi3 qwen3_5_text seed_oss smollm3
stablelm starcoder2 xlm xlstm"""
ENCODERS = """albert camembert deberta-v2 ernie eurobert flaubert longformer modernbert mpnet
nomic_bert xlm xlm-roberta"""
COUNTS = "its outputs are not those of the whole model"
REFUSED: dict[str, tuple[TaskType, str]] = {
    "diffllama": ("causal_lm", COUNTS),
    "zaya": ("causal_lm", COUNTS),
    "esmc": ("mlm", COUNTS),
    "hrm_text": ("causal_lm", "the layers of a hrm_text model are not found"),
    "beam": ("causal_lm", COUNTS),
    **{
        name: ("mlm", f"the layers of a {name} model are not found")
        for name in ("bart", "mbart", "mvp")
    },
}


def opened(folder: Path, task: TaskType):
    auto = AUTO_CLASSES[task]
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def settings(task: TaskType) -> TaskConfig:
    return TaskConfig(type=task, dataset="d", max_length=16)


def source(folder: Path, task: TaskType) -> ModelSource:
    return resolve_model(str(folder), settings(task), where="student.model")


def cut(folder: Path, task: TaskType, stay: tuple[int, ...] = STAY) -> Path:
    """The folder of the model with the layers that stay, as a run writes it."""
    model = load_model(
        with_layers(source(folder, task), stay, where=KEY),
        task=settings(task),
        label_names=(),
        tokenizer_size=SMALL["vocab_size"],
        ds=None,
        dtype=torch.float32,
        seed=1,
        need_head=True,
    )
    write_model_folder(folder / "cut", content_of(model, None))
    return folder / "cut"


@torch.no_grad()
def passed_by(folder: Path, task: TaskType, stay: tuple[int, ...]) -> Tensor:
    """The logits of the whole model, whose other layers are passed by."""
    whole = opened(folder, task)
    with ExitStack() as without:
        count = architecture_of(whole.config).number_of_layers(whole.config)
        for layer in {*range(1, count + 1)} - {*stay}:
            without.enter_context(left_out(whole, layer))
        return logits_of(whole, TOKENS)


def written(model_type: str, task: TaskType, folder: Path) -> bool:
    """Write a small model of a family; False if none can be built, or does not run."""
    config = small_config(model_type, task, LAYERS)
    if config is None:
        return False
    try:
        model = build(config, task)
        logits_of(model, TOKENS)
        model.save_pretrained(folder)
        return bool(logits_of(opened(folder, task), TOKENS).isfinite().all())
    except Exception:  # noqa: BLE001 - the code of a family may fail in its own way
        return False


def assert_cut(folder: Path, task: TaskType, stay: tuple[int, ...] = STAY) -> None:
    with torch.no_grad():
        actual = logits_of(opened(cut(folder, task, stay), task), TOKENS)
    assert_same(actual, passed_by(folder, task, stay))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("task", "model_type"),
    [*(("causal_lm", name) for name in DECODERS.split())]
    + [("mlm", name) for name in ENCODERS.split()],
)
def test_the_layers_that_stay_compute_alone_what_they_compute_in_the_model(
    tmp_path, task, model_type
):
    assert written(model_type, task, tmp_path)
    assert_cut(tmp_path, task)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_weights_that_hold_a_block_for_each_layer_lose_those_of_the_others(tmp_path, model_type):
    # The last layer takes its keys from the third; all have embeddings in one table.
    assert written(model_type, "causal_lm", tmp_path)
    assert_cut(tmp_path, "causal_lm", SHARING)
    with pytest.raises(ModelError, match="cannot keep the layers 1, 4 alone"):
        cut(tmp_path, "causal_lm")


def test_a_view_of_some_layers_writes_and_counts_their_blocks_alone(tmp_path):
    assert written("gemma4_text", "causal_lm", tmp_path)
    teacher, stay = source(tmp_path, "causal_lm"), (3, 4)
    view = teacher.whole._replace(layers=stay)
    smaller = opened(reshaped(teacher, tmp_path / "cut", "causal_lm", view=view), "causal_lm")

    with torch.no_grad():
        assert_same(logits_of(smaller, TOKENS), passed_by(tmp_path, "causal_lm", stay))
    config: Any = SimpleNamespace(task=settings("causal_lm"))
    counted = RunFacts(config, {}, world=1).parameters(teacher, view).parameters
    assert counted == sum(weight.numel() for weight in smaller.parameters())


@pytest.mark.parametrize("model_type", REFUSED)
def test_layers_that_would_not_compute_the_same_are_refused(tmp_path, model_type):
    task, reason = REFUSED[model_type]
    assert written(model_type, task, tmp_path)
    with pytest.raises(ModelError, match=rf"^student.layers: .*{reason}"):
        cut(tmp_path, task)


@pytest.mark.parametrize(("layers", "generates"), [((1, 2), False), ((1, 3), True)])
def test_a_hybrid_without_attention_is_said_to_generate_without_a_cache_alone(
    tmp_path, caplog, layers, generates
):
    config = small_config("lfm3", "causal_lm", LAYERS)
    assert config.layer_types == ["conv", "conv", "full_attention", "conv"]
    build(config, "causal_lm").save_pretrained(tmp_path)
    key = f"{KEY} of {tmp_path}"
    with_layers(source(tmp_path, "causal_lm"), layers, where=key)
    said = "layers 1, 2 alone cannot generate text with a cache"
    assert [said in text for text in caplog.messages if text.startswith(key)] == [True] * (
        not generates
    )


def test_a_number_of_layers_that_the_class_cannot_have_is_refused_in_words(tmp_path):
    config = CONFIG_MAPPING["rwkv"](vocab_size=512, hidden_size=64, num_hidden_layers=2)
    build(config, "causal_lm").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the layers 1 alone: its class cannot be built with 1 of"):
        with_layers(source(tmp_path, "causal_lm"), (1,), where=KEY)


SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 4},
    "llama4_text": {"moe_layers": [1, 3], "num_local_experts": 4},
    "deepseek_v3": {"first_k_dense_replace": 2, "n_routed_experts": 16, "num_key_value_heads": 4},
}


@pytest.mark.parametrize("model_type", SPECIAL)
def test_layers_that_a_config_counts_or_names_in_its_own_way_are_cut(tmp_path, model_type):
    keys = {**SMALL, "num_hidden_layers": LAYERS, "head_dim": 16, "moe_intermediate_size": 32}
    if model_type == "gpt_neo":
        keys = {"hidden_size": 64, "vocab_size": 512, "max_position_embeddings": 256}
    if model_type == "deepseek_v3":
        del keys["head_dim"]
    config = CONFIG_MAPPING[model_type](**{**keys, **SPECIAL[model_type]})
    build(config, "causal_lm").save_pretrained(tmp_path)
    assert_cut(tmp_path, "causal_lm")


def fewer(model_type: str, layers: tuple[int, ...], **keys: Any) -> Any:
    """The config of some layers of a model with as many layers as the first value is long."""
    config = CONFIG_MAPPING[model_type](**{**SMALL, "num_hidden_layers": LAYERS, **keys})
    architecture = replace(
        architecture_of(small_config("llama", "causal_lm")), model_type=model_type
    )
    return config_with_layers(config, architecture, layers)


def test_layers_in_lists_and_dictionaries_by_number_have_new_numbers():
    every = fewer("llama4_text", STAY, moe_layers=[0, 1, 2, 3], no_rope_layers=[1, 1, 1, 0])
    assert (every.moe_layers, every.no_rope_layers) == ([0, 1], [1, 0])
    assert fewer("llama4_text", (2, 4), moe_layers=[0, 3]).moe_layers == [1]
    by_number = fewer("lfm2", (2, 3), full_attn_idxs=[0, 2])
    assert by_number.full_attn_idxs == [1]
    assert by_number.layer_types == ["conv", "full_attention"]
    named = fewer("gemma4_text", (1, 3), per_layer_config={2: {"intermediate_size": 48}})
    assert named.to_dict()["per_layer_config"] == {"1": {"intermediate_size": 48}}
    assert fewer("deepseek_v3", (1, 4), first_k_dense_replace=3).first_k_dense_replace == 1
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = fewer("gemma4_text", (1, 2, 4), layer_types=kinds, num_kv_shared_layers=2)
    assert shared.num_kv_shared_layers == 1


def test_lists_that_are_as_long_by_chance_stay():
    config = fewer("falcon_h1", (1, 2), num_hidden_layers=5, eos_token_id=[2, 3, 4, 5, 6])
    assert config.ssm_multipliers == [1.0] * 5
    assert config.eos_token_id == [2, 3, 4, 5, 6]


EVERY = [(task, name) for task in ("causal_lm", "mlm") for name in sorted(TYPES[task])]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model_type"), EVERY)
def test_every_family_that_is_read_is_cut_or_among_the_few_that_are_refused(
    tmp_path, task, model_type
):
    if model_type == "fuyu":
        pytest.skip("its text part is read, which is another model")
    if not written(model_type, task, tmp_path):
        pytest.skip("no small model of the family runs")
    try:
        source(tmp_path, task)
    except ModelError as error:
        pytest.skip(str(error))
    if REFUSED.get(model_type, ("", ""))[0] == task:
        with pytest.raises(ModelError, match=REFUSED[model_type][1]):
            cut(tmp_path, task)
    else:
        assert_cut(tmp_path, task, SHARING if model_type.startswith("gemma") else STAY)
