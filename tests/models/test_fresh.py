import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megakd.models.fresh import initialize_parameters

NAMES = ("a", "b", "c")


def state(tiny, model_type, **changes):
    task = tiny.task_for(model_type)
    names = NAMES if task.type == "classification" else ()
    spec = tiny.scratch(model_type, **changes.pop("config", {}))
    return tiny.load(spec, task, label_names=names, need_head=False, **changes).state_dict()


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", "llama"])
def test_every_parameter_of_a_scratch_model_gets_a_first_value(tiny, model_type):
    values = state(tiny, model_type)
    for name, value in values.items():
        assert torch.isfinite(value).all(), name
        assert value.ndim == 1 or 0.015 < value.std() < 0.025, name


# The deeper a GPT-2, the smaller what a layer adds to the hidden states: 0.02 / sqrt(2 * layers).
def test_an_attention_has_a_say_in_how_its_projections_start(tiny):
    values = state(tiny, "gpt2", config={"n_layer": 8})
    for name, value in values.items():
        wanted = 0.005 if name.endswith("c_proj.weight") else 0.02
        assert value.ndim == 1 or 0.7 * wanted < value.std() < 1.3 * wanted, name


def test_new_values_leave_those_that_are_loaded_as_they_are(tiny):
    folder = tiny.save("gpt2", n_layer=1)
    tiny.rewrite(lambda t: {name: t[name] for name in t if "c_proj" not in name})
    rest = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    lacking = [p for name, p in model.named_parameters() if "attn.c_proj" in name]

    initialize_parameters(model, lacking, seed=3)

    values = model.state_dict()
    assert all(torch.equal(values[name], value) for name, value in rest.items())
    fresh = state(tiny, "gpt2", config={"n_layer": 1}, seed=3)
    name = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(values[name], fresh[name])


def test_the_same_seed_gives_the_same_values_and_another_seed_or_module_others(tiny):
    once, again, other = (state(tiny, "bert", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["classifier.weight"], other["classifier.weight"])
    attention = "bert.encoder.layer.0.attention.self"
    assert not torch.equal(once[f"{attention}.query.weight"], once[f"{attention}.key.weight"])


def test_a_parameter_does_not_depend_on_the_rest_of_the_model(tiny):
    shallow, deep = state(tiny, "bert", config={"num_hidden_layers": 1}), state(tiny, "bert")
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)


def test_bf16_values_are_the_fp32_values_rounded(tiny):
    full, half = state(tiny, "llama"), state(tiny, "llama", dtype=torch.bfloat16)
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)


def test_a_new_head_is_that_of_a_scratch_model_with_the_same_seed(tiny):
    folder = tiny.save("bert", num_labels=2)
    model = tiny.load(folder, tiny.task(), label_names=NAMES, need_head=False, seed=5)
    assert torch.equal(model.classifier.weight, state(tiny, "bert", seed=5)["classifier.weight"])


def test_the_row_of_the_padding_token_starts_at_zero(tiny):
    row = state(tiny, "bert", config={"pad_token_id": 7})["bert.embeddings.word_embeddings.weight"]
    assert not row[7].any()
    assert row[0].any()
