"""Adapters of a student: where they are put, what learns, and the files they are exported as."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
import torch
from cut_families import FAMILIES
from peft import PeftModel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from megakd.config.sections import LoraConfig
from megakd.errors import ConfigError
from megakd.models.lora import (
    ADAPTER,
    adapter_parameters,
    add_adapters,
    base_model,
    check_adapters,
    merged_state,
)
from megakd.models.model_folder import ModelContent, write_model_folder
from megakd.models.structure import architecture_of

DECODERS = [name for name, entry in FAMILIES.items() if "causal_lm" in entry.tasks]
DECODERS += ["phi3", "gpt_oss", "qwen3_moe"]
# peft 0.21.2 reads a property that transformers 5.23 renames.
OF_PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def adapted(tiny, model_type, *, task=None, lora=None, **saved):
    task = task or tiny.task_for(model_type)
    source = tiny.resolve(tiny.save(model_type, **saved), task)
    plain, model = (tiny.load(source, task) for _ in range(2))
    add_adapters(model, source, task, lora or LoraConfig(r=3), seed=1)
    return plain, model.eval()


def learned(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def set_adapters(model):
    """Give the second factors and a new head values, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in learned(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif "lora_" not in name:
                parameter.add_(1.0)


def export(model, folder):
    state, files = merged_state(model)
    write_model_folder(folder, ModelContent(model.config, state, extra=files))
    return folder


def test_adapters_are_refused_where_they_would_leave_a_random_head_frozen(tiny):
    folder = tiny.save("bert", auto=AutoModel)
    mlm, classification = (
        tiny.resolve(folder, tiny.task(kind)) for kind in ("mlm", "classification")
    )

    check_adapters(classification, tiny.task(), LoraConfig())  # which train this head
    with pytest.raises(
        ConfigError, match=r"lacks cls\.predictions\.transform\..* random and frozen"
    ):
        check_adapters(mlm, tiny.task("mlm"), LoraConfig())


@pytest.mark.parametrize(
    "model_type", ["bert", "distilbert", "electra", "enct5", "llama", "phi", "gpt2"]
)
def test_new_adapters_change_no_output_and_only_they_learn_in_attention_and_mlp(tiny, model_type):
    plain, model = adapted(tiny, model_type)
    ids, mask = tiny.input_ids, torch.ones_like(tiny.input_ids)

    with torch.no_grad():
        logits, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (model, plain))

    assert type(model) is type(plain)
    assert torch.equal(logits, expected)
    entry = architecture_of(plain.config)
    for name in learned(model):
        is_head = model_type not in DECODERS and entry.of_the_task(name)
        assert is_head or "lora_" in name, name
    paths = {name.partition(".lora_A")[0] for name in learned(model) if ".lora_A" in name}
    found = entry.found_units(plain.config)
    wanted = {
        f"{owner}.{path}"
        for _, owner, units in (*found.parts_with("heads"), *found.parts_with("neurons"))
        for path in (*units.makers, units.output)
    }
    assert paths == wanted & {path for path, _ in plain.named_modules()}
    assert not any(path.startswith((entry.head, *entry.renewed)) for path in paths)


@pytest.mark.filterwarnings(OF_PEFT)
@pytest.mark.parametrize(
    ("model_type", "kind", "auto", "heads"),
    [
        *(
            (name, "causal_lm", AutoModelForCausalLM, set())
            for name in ("llama", "some of llama", "gpt2", "phi3", "gpt_oss")
        ),
        ("bert", "mlm", AutoModelForMaskedLM, set()),
        ("bert", "classification", AutoModelForSequenceClassification, {"classifier", "bert"}),
    ],
)
def test_the_merged_folder_and_the_adapter_on_its_base_give_the_outputs_of_training(
    tiny, tmp_path, model_type, kind, auto, heads
):
    lora = LoraConfig(r=3, alpha=5.0)
    if model_type == "some of llama":
        lora = LoraConfig(r=2, target_modules=("q_proj", "down_proj"))
    family = model_type.split()[-1]
    _, model = adapted(tiny, family, task=tiny.task(kind), lora=lora, auto=auto)
    set_adapters(model)

    folder = export(model, tmp_path / "out")

    # A head that is no output layer of a language model learns too, with the pooler before it.
    assert {name.split(".")[0] for name in learned(model) if "lora_" not in name} == heads
    merged = auto.from_pretrained(folder).eval()
    base = auto.from_pretrained(tiny.folder).eval()
    again = PeftModel.from_pretrained(base, folder / ADAPTER).eval()
    with torch.no_grad():
        actual = [m(tiny.input_ids).logits for m in (merged, again)]
        expected = model(tiny.input_ids).logits
    for logits in actual:
        assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    assert adapter_parameters(folder) == sum(p.numel() for p in learned(model).values())


def test_adapters_have_the_dtype_of_the_base_and_the_values_of_the_seed(tiny):
    task = tiny.task("causal_lm")
    source = tiny.resolve(tiny.save("llama"), task)

    def drawn(seed, dtype=torch.float32):
        model = tiny.load(source, task, dtype=dtype)
        before = torch.get_rng_state()
        with patch("torch.cuda.manual_seed_all") as seed_of_gpus:
            add_adapters(model, source, task, LoraConfig(r=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        seed_of_gpus.assert_not_called()
        return learned(model)

    first, again, other, narrow = drawn(1), drawn(1), drawn(2), drawn(1, torch.bfloat16)

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert {p.dtype for p in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(first[name].bfloat16(), narrow[name]) for name in first)


def test_the_base_answers_without_adapters_dropout_or_gradient_and_leaves_nothing_changed(tiny):
    plain, model = adapted(tiny, "llama", lora=LoraConfig(r=3, dropout=0.5))
    set_adapters(model)
    model.train()
    before = list(learned(model))

    with base_model(model) as base:
        logits = base(tiny.input_ids).logits

    with torch.no_grad():
        assert torch.equal(logits, plain(tiny.input_ids).logits)
    assert not logits.requires_grad
    assert all(module.training for module in model.modules())
    assert list(learned(model)) == before
    first, again = (model(tiny.input_ids).logits for _ in range(2))
    assert not torch.equal(first, again)  # dropout of the adapters
    with pytest.raises(TypeError, match="no adapters"), base_model(plain):
        pass


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("model_type", "wanted", "exported"),
    [
        ("llama", None, TARGETS),
        ("bert", None, ["query", "key", "value", "output.dense", "intermediate.dense"]),
        ("llama", ("0.self_attn.q_proj",), ["0.self_attn.q_proj"]),
    ],
)
def test_the_adapter_names_its_targets_as_short_as_they_are_unique(
    tiny, tmp_path, model_type, wanted, exported
):
    _, model = adapted(tiny, model_type, lora=LoraConfig(r=2, target_modules=wanted))

    folder = export(model, tmp_path / "out")

    actual = json.loads((folder / ADAPTER / "adapter_config.json").read_text())
    names = actual["target_modules"]
    assert {n.split(".")[-1] for n in names} == {n.split(".")[-1] for n in exported}
    assert len(names) == len(exported) or model_type == "bert"
    keys = ("base_model_name_or_path", "inference_mode", "r", "lora_alpha")
    assert [actual[key] for key in keys] == [str(tiny.folder), True, 2, 4.0]


def test_targets_that_cannot_be_adapted_are_refused_before_anything_is_loaded(tiny):
    task = tiny.task("causal_lm")
    source = tiny.resolve(tiny.save("llama"), task)
    for file in tiny.folder.glob("*.safetensors"):
        file.unlink()  # nothing is read

    for target in ("lm_head", "embed_tokens", "input_layernorm"):
        lora = LoraConfig(target_modules=("q_proj", target))
        message = rf'"{target}" is not a linear layer of attention or MLP.*not in embeddings'
        with pytest.raises(ConfigError, match=message):
            check_adapters(source, task, lora)
