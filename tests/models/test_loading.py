"""Models as they are loaded, first values of weights that are not stored, and experts."""

import dataclasses
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    EsmConfig,
    LlamaForCausalLM,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from megakd.errors import ModelError
from megakd.models.fitting import valueless_model
from megakd.models.loading import load_finished, with_vocabulary
from megakd.models.weights import initialize_parameters
from megakd.reports.plan_tracing import send_tokens_to_one_expert

NAMES = ("joy", "anger", "fear")


def same_values(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("model_type", "tied", "dtype"),
    [
        *((name, True, torch.float32) for name in ("mistral", "qwen2", "qwen3", "gpt2")),
        *((name, False, torch.bfloat16) for name in ("llama", "qwen3_moe", "gpt_oss")),
    ],
)
def test_a_language_model_answers_exactly_as_transformers_loads_it(tiny, model_type, tied, dtype):
    folder = tiny.save(model_type, tie_word_embeddings=tied)

    model = tiny.load(folder, tiny.task("causal_lm"), dtype=dtype)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(model(tiny.input_ids).logits, reference(tiny.input_ids).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("model_type", ["t5_encoder", "enct5"])
def test_all_weights_of_a_t5_have_the_dtype_that_was_asked_for(tiny, model_type):
    model = tiny.load(tiny.save(model_type), tiny.task(), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(tiny.input_ids).logits.isfinite().all()


def test_a_masked_language_model_gives_its_encoder_and_its_head_is_named_in_the_log(tiny, caplog):
    folder = tiny.save("bert", auto=AutoModelForMaskedLM)

    with caplog.at_level(logging.INFO, logger="megakd"):
        model = tiny.load(folder, tiny.task(), label_names=NAMES, need_head=False)

    reference = AutoModelForMaskedLM.from_pretrained(folder).bert
    assert same_values(model.bert.encoder, reference.encoder)
    assert "5 stored weights are not used, such as cls.predictions" in caplog.text
    assert "4 weights are newly initialized, such as bert.pooler" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "new"),
    [("bert", "cls.predictions.transform.dense"), ("roberta", "lm_head.dense")],
)
def test_a_new_head_of_a_masked_language_model_is_a_warning_with_its_tensors(
    tiny, caplog, model_type, new
):
    tiny.load(tiny.save(model_type, auto=AutoModel), tiny.task("mlm"), need_head=False)
    (warning,) = (line for line in caplog.records if line.levelno == logging.WARNING)
    assert "5 weights are newly initialized, such as " in warning.getMessage()
    assert f"{new}.weight" in warning.getMessage()


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("bert", {"output_hidden_states": True, "output_attentions": True}),
        ("llama", {"return_dict": False}),
        ("enct5", {"return_dict": False, "output_hidden_states": True}),
    ],
)
def test_a_config_that_changes_the_form_of_the_outputs_is_read_like_any_other(
    tiny, model_type, keys
):
    folder, task = tiny.save(model_type), tiny.task_for(model_type)
    facts = {"label_names": ("0", "1") if task.type == "classification" else ()}
    expected = tiny.load(folder, task, **facts)(tiny.input_ids)
    tiny.rewrite_config(**keys)
    for model in (tiny.load(folder, task, **facts), load_finished(folder, "MODEL").eval()):
        outputs = model(tiny.input_ids)
        assert outputs.keys() == expected.keys()
        assert torch.equal(outputs.logits, expected.logits)


def test_the_gamma_and_beta_of_old_checkpoints_are_read(tiny):
    folder = tiny.save("bert", id2label=dict(enumerate(NAMES)))
    expected = AutoModelForSequenceClassification.from_pretrained(folder)

    def old(name):
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return name.replace("LayerNorm.bias", "LayerNorm.beta")

    tiny.rewrite(lambda tensors: {old(name): value for name, value in tensors.items()})

    assert same_values(tiny.load(folder, tiny.task(), label_names=NAMES), expected)


def test_the_head_of_a_tied_model_may_be_the_only_copy_and_no_second_value(tiny):
    folder, task = tiny.save("llama", tie_word_embeddings=True), tiny.task("causal_lm")
    expected = tiny.load(folder, task)
    tiny.rewrite(lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight"), **t})
    assert same_values(tiny.load(folder, task), expected)

    tiny.rewrite(lambda t: {**t, "model.embed_tokens.weight": t["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        tiny.load(folder, task)


@pytest.mark.parametrize("model_type", ["bert", "electra", "t5_encoder", "enct5"])
def test_a_stored_head_is_kept_for_the_same_labels_and_new_for_others(tiny, model_type, caplog):
    folder = tiny.save(model_type, id2label=dict(enumerate(NAMES)))
    stored = AutoModelForSequenceClassification.from_pretrained(folder)

    same = tiny.load(folder, tiny.task(), label_names=NAMES, need_head=False)
    others = ("fear", "joy", "anger")
    reordered = [
        tiny.load(folder, tiny.task(), label_names=others, need_head=is_frozen)
        for is_frozen in (False, True)
    ]
    assert "a new head is drawn" not in caplog.text
    more = tiny.load(folder, tiny.task(), label_names=(*NAMES, "trust"), need_head=False)

    assert same_values(same, stored)
    assert torch.equal(same(tiny.input_ids).logits, stored(tiny.input_ids).logits)
    assert "joy, anger, fear, and the data have joy, anger, fear, trust: a new head" in caplog.text
    for model in reordered:
        assert torch.equal(
            model(tiny.input_ids).logits, stored(tiny.input_ids).logits[:, [2, 0, 1]]
        )
        assert model.config.id2label == dict(enumerate(others))
    assert more(tiny.input_ids).logits.shape == (2, 4)
    assert same_values(more.get_input_embeddings(), stored.get_input_embeddings())


@pytest.mark.parametrize(
    ("kind", "labels", "problem"),
    [("classification", NAMES, "single_label_classification"), ("regression", (), "regression")],
)
def test_a_bare_backbone_gets_its_prefix_and_a_new_head(tiny, kind, labels, problem):
    folder = tiny.save("bert", auto=AutoModel)

    model = tiny.load(folder, tiny.task(kind), label_names=labels, need_head=False)

    reference = AutoModel.from_pretrained(folder)
    assert torch.equal(model.bert(tiny.input_ids)[0], reference(tiny.input_ids)[0])
    assert model.classifier.weight.shape == (len(labels) or 1, 16)
    assert model.config.problem_type == problem
    assert not labels or model.config.id2label == dict(enumerate(labels))


def test_a_scratch_model_takes_the_vocabulary_of_the_tokenizer(tiny):
    spec = tiny.scratch("bert")
    del spec.config["vocab_size"]
    source = tiny.resolve(spec, tiny.task())

    model = tiny.load(source, tiny.task(), label_names=NAMES, tokenizer_size=777, need_head=False)
    padded = with_vocabulary(source, 777, pad_token_id=5)

    assert model.get_input_embeddings().weight.shape == (777, 16)
    assert (padded.config.vocab_size, padded.config.pad_token_id) == (777, 5)
    assert source.config.vocab_size != 777
    # Special tokens beyond its vocabulary are forgotten.
    spec = tiny.scratch("gpt2")
    for key in ("vocab_size", "bos_token_id", "eos_token_id"):
        del spec.config[key]
    config = with_vocabulary(tiny.resolve(spec, tiny.task("causal_lm")), 777).config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (777, None, None)


def test_loading_leaves_the_random_state_and_the_source_as_they_were(tiny):
    folder = tiny.save("bert", auto=AutoModel)
    source = tiny.resolve(folder, tiny.task())
    before, config = torch.get_rng_state(), source.config.to_dict()

    tiny.load(source, tiny.task(), label_names=NAMES, need_head=False)

    assert torch.equal(torch.get_rng_state(), before)
    assert source.config.to_dict() == config


def test_the_switch_of_transformers_does_not_shard_a_plain_model_and_stays_set(tiny):
    folder = tiny.save("llama")
    switch = HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    )

    model = tiny.load(folder, tiny.task("causal_lm"))

    assert is_deepspeed_zero3_enabled()
    assert not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    del switch


def test_a_model_is_built_on_its_device_and_never_whole_on_the_host(tiny):
    """`meta` stands for a GPU: a tensor of the host among these would be found."""
    for model_type in ("bert", "llama"):
        task = tiny.task_for(model_type)
        model = tiny.load(tiny.save(model_type), task, device=torch.device("meta"))
        assert {p.device.type for p in model.parameters()} == {"meta"}


def state(tiny, model_type, **changes):
    task = tiny.task_for(model_type)
    names = NAMES if task.type == "classification" else ()
    spec = tiny.scratch(model_type, **changes.pop("config", {}))
    return tiny.load(spec, task, label_names=names, need_head=False, **changes).state_dict()


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", "llama"])
def test_every_parameter_of_a_scratch_model_gets_a_first_value(tiny, model_type):
    for name, value in state(tiny, model_type).items():
        assert torch.isfinite(value).all(), name
        assert value.ndim == 1 or 0.015 < value.std() < 0.025, name
    # The row of the padding token starts at zero.
    row = state(tiny, "bert", config={"pad_token_id": 7})["bert.embeddings.word_embeddings.weight"]
    assert (row[7].any(), row[0].any()) == (False, True)


def test_a_value_that_a_constructor_alone_knows_is_that_of_the_constructor(tiny):
    spec = tiny.scratch("apertus", num_key_value_heads=1)

    values = tiny.load(spec, tiny.task("causal_lm"), need_head=False).state_dict()

    expected = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec.config)).state_dict()
    name = "model.layers.1.mlp.act_fn.alpha_p"
    assert torch.equal(values[name], expected[name].float())


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


def test_a_value_depends_on_seed_and_name_and_not_on_the_rest_of_the_model_or_the_dtype(tiny):
    once, again, other = (state(tiny, "bert", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["classifier.weight"], other["classifier.weight"])
    attention = "bert.encoder.layer.0.attention.self"
    assert not torch.equal(once[f"{attention}.query.weight"], once[f"{attention}.key.weight"])
    shallow = state(tiny, "bert", config={"num_hidden_layers": 1}, seed=3)
    assert all(torch.equal(shallow[name], once[name]) for name in shallow)
    half = state(tiny, "bert", seed=3, dtype=torch.bfloat16)
    assert all(torch.equal(once[name].bfloat16(), half[name]) for name in once)
    # A new head on stored layers is that of a scratch model.
    folder = tiny.save("bert", num_labels=2)
    model = tiny.load(folder, tiny.task(), label_names=NAMES, need_head=False, seed=3)
    assert torch.equal(model.classifier.weight, once["classifier.weight"])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        *(
            (name, r"lacks 1 weights of a qwen3_moe model \(model.layers.0|\[3, .* requires \[4, ")
            for name in ("1.up_proj", "0.down_proj", "2.gate_proj")
        ),
        ("3", r"of shape \[3, .*config.json requires \[4, "),  # fewer experts than the config says
    ],
)
def test_experts_or_parts_of_them_that_are_missing_are_refused(tiny, missing, message):
    start = f"model.layers.0.mlp.experts.{missing}."
    folder = tiny.save("qwen3_moe")
    tiny.rewrite(lambda t: {name: t[name] for name in t if not name.startswith(start)})
    with pytest.raises(ModelError, match=message):
        tiny.load(folder, tiny.task("causal_lm"))


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_one_expert_computes_what_equal_experts_do(tiny, family):
    model = tiny.load(tiny.save(family), tiny.task("causal_lm"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight.copy_(weight[:1].expand_as(weight))
        expected = model(tiny.input_ids).logits

        send_tokens_to_one_expert(model)

        torch.testing.assert_close(model(tiny.input_ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "dtype"), [("gpt_oss", torch.float32), ("qwen3_moe", torch.bfloat16)]
)
def test_a_mixture_runs_without_values(tiny, family, dtype):
    task = tiny.task("causal_lm")
    source = tiny.resolve(tiny.scratch(family), task)
    model = valueless_model(source, task, source.config).to(dtype)
    send_tokens_to_one_expert(model)
    assert model(tiny.input_ids.to("meta")).logits.shape == (2, 12, 300)


def test_a_frozen_model_has_in_fp32_what_transformers_keeps_so(tiny, monkeypatch):
    folder = tiny.save("llama")
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["mlp.*_proj"])
    task, half = tiny.task("causal_lm"), torch.bfloat16

    frozen = tiny.load(folder, task, dtype=half)

    assert same_values(frozen, AutoModelForCausalLM.from_pretrained(folder, dtype=half))
    assert frozen.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert (
        tiny.load(folder, task, dtype=half, need_head=False)
        .model.layers[0]
        .mlp.up_proj.weight.dtype
        == half
    )


def test_dropout_is_set_where_a_config_has_a_rate_and_switches_stay(tiny):
    config = EsmConfig(vocab_size=11, token_dropout=True, hidden_dropout_prob=0.1)
    source = dataclasses.replace(
        tiny.resolve(tiny.save("bert"), tiny.task()), config=config
    ).with_dropout(0.0)
    assert source.config.token_dropout is True
    assert source.config.hidden_dropout_prob == 0.0
