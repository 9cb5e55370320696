import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from megakd.config import ScratchModel
from megakd.errors import ModelError
from megakd.models import loading
from megakd.models.loading import check_model, with_vocabulary

NAMES = ("joy", "anger", "fear")
ENCODERS = ["bert", "roberta", "distilbert", "electra"]


def rewrite(folder, change):
    """Rewrites the weights of a saved folder with `change(tensors)`."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def rewrite_config(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def same_values(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_classifier_answers_exactly_as_transformers_loads_it(tiny, model_type):
    folder = tiny.save(model_type, num_labels=3)

    model = tiny.load(folder, tiny.task(), label_names=NAMES)

    reference = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model(tiny.input_ids).logits, reference(tiny.input_ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_a_language_model_answers_exactly_as_transformers_loads_it(tiny, model_type, tied, dtype):
    folder = tiny.save(model_type, tie_word_embeddings=tied)

    model = tiny.load(folder, tiny.task("causal_lm"), dtype=dtype)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(model(tiny.input_ids).logits, reference(tiny.input_ids).logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_rotary_tables_stay_in_fp32_when_the_weights_are_bf16(tiny):
    folder = tiny.save("llama")

    model = tiny.load(folder, tiny.task("causal_lm"), dtype=torch.bfloat16)

    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_bare_backbone_gets_its_prefix_and_a_new_head(tiny):
    folder = tiny.save("bert", auto=AutoModel)

    model = tiny.load(folder, tiny.task(), label_names=NAMES, need_head=False)

    reference = AutoModel.from_pretrained(folder)
    assert torch.equal(model.bert(tiny.input_ids)[0], reference(tiny.input_ids)[0])
    assert model.classifier.weight.shape == (3, 16)
    assert model.config.id2label == {0: "joy", 1: "anger", 2: "fear"}
    assert model.config.problem_type == "single_label_classification"


def test_a_masked_language_model_gives_its_encoder_and_its_head_is_named_in_the_log(tiny, caplog):
    folder = tiny.save("bert", auto=AutoModelForMaskedLM)

    with caplog.at_level(logging.INFO, logger="megakd"):
        model = tiny.load(folder, tiny.task(), label_names=NAMES, need_head=False)

    reference = AutoModelForMaskedLM.from_pretrained(folder).bert
    assert same_values(model.bert.encoder, reference.encoder)
    assert "5 stored weights are not used: cls.predictions" in caplog.text
    assert "4 weights start new: bert.pooler" in caplog.text


def test_the_gamma_and_beta_of_old_checkpoints_are_read(tiny):
    folder = tiny.save("bert", num_labels=3)
    expected = AutoModelForSequenceClassification.from_pretrained(folder)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(tensors):
        for new, name in old.items():
            tensors = {key.replace(new, name): value for key, value in tensors.items()}
        return tensors

    rewrite(folder, rename)

    assert same_values(tiny.load(folder, tiny.task(), label_names=NAMES), expected)


def test_a_sharded_checkpoint_and_a_pickle_give_the_same_model(tiny):
    folder = tiny.save("llama", tie_word_embeddings=False)
    task = tiny.task("causal_lm")
    expected = tiny.load(folder, task)
    expected.save_pretrained(folder / "shards", max_shard_size="20KB")
    torch.save(expected.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    shards = tiny.load(folder / "shards", task)
    pickled = tiny.load(tiny.resolve(folder, task, allow_pickle=True), task)

    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    assert same_values(shards, expected)
    assert same_values(pickled, expected)


def test_the_head_of_a_tied_model_may_be_the_only_copy(tiny):
    folder = tiny.save("llama", tie_word_embeddings=True)
    expected = tiny.load(folder, tiny.task("causal_lm"))
    rewrite(folder, lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight"), **t})

    assert same_values(tiny.load(folder, tiny.task("causal_lm")), expected)


def test_tied_names_with_different_values_are_refused(tiny):
    folder = tiny.save("llama", tie_word_embeddings=True)
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1})

    with pytest.raises(ModelError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        tiny.load(folder, tiny.task("causal_lm"))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_stored_head_is_kept_for_the_same_labels_and_new_for_others(tiny, model_type):
    folder = tiny.save(model_type, id2label=dict(enumerate(NAMES)))
    stored = AutoModelForSequenceClassification.from_pretrained(folder)

    same = tiny.load(folder, tiny.task(), label_names=NAMES, need_head=False)
    reordered = tiny.load(folder, tiny.task(), label_names=NAMES[::-1], need_head=False)
    more = tiny.load(folder, tiny.task(), label_names=(*NAMES, "trust"), need_head=False)

    assert same_values(same, stored)
    assert not torch.equal(reordered(tiny.input_ids).logits, stored(tiny.input_ids).logits)
    assert more(tiny.input_ids).logits.shape == (2, 4)
    assert same_values(more.base_model.embeddings, stored.base_model.embeddings)


def test_regression_has_one_output(tiny):
    folder = tiny.save("bert", auto=AutoModel)

    model = tiny.load(folder, tiny.task("regression"), need_head=False)

    assert model(tiny.input_ids).logits.shape == (2, 1)
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


def test_a_scratch_model_takes_the_vocabulary_of_the_tokenizer(tiny):
    spec = tiny.scratch("bert")
    del spec.config["vocab_size"]
    source = tiny.resolve(spec, tiny.task())

    model = tiny.load(source, tiny.task(), label_names=NAMES, tokenizer_size=777, need_head=False)
    padded = with_vocabulary(source, 777, pad_token_id=5)

    assert model.get_input_embeddings().weight.shape == (777, 16)
    assert (padded.config.vocab_size, padded.config.pad_token_id) == (777, 5)
    assert source.config.vocab_size != 777


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


def test_the_stored_dtype_is_that_of_the_weights(tiny):
    folder = tiny.save("llama")
    rewrite(folder, lambda tensors: {key: value.bfloat16() for key, value in tensors.items()})

    assert tiny.resolve(folder, tiny.task("causal_lm")).stored_dtype == torch.bfloat16


# What bad input gets.


def refusal(tiny, folder, task, **changes):
    facts = {"label_names": (), "tokenizer_size": 300, "need_head": True, **changes}
    with pytest.raises(ModelError) as caught:
        check_model(tiny.resolve(folder, task), task=task, **facts)
    return str(caught.value)


def test_a_teacher_without_a_head_is_refused(tiny):
    folder = tiny.save("bert", auto=AutoModel)

    text = refusal(tiny, folder, tiny.task(), label_names=NAMES)

    assert f"teacher.model: {folder} has no head for classification" in text
    assert "set teacher.finetune or give a folder that was fine-tuned" in text


def test_another_number_of_labels_is_refused_with_both_numbers(tiny):
    folder = tiny.save("bert", num_labels=3)

    text = refusal(tiny, folder, tiny.task(), label_names=("a", "b"))

    assert "the model has 3 labels (LABEL_0, LABEL_1, LABEL_2) and the data 2 (a, b)" in text


def test_a_classifier_is_refused_for_regression(tiny):
    folder = tiny.save("bert", num_labels=3)

    assert "has 3 outputs and regression needs 1" in refusal(tiny, folder, tiny.task("regression"))


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_the_head_is_looked_at(tiny):
    folder = tiny.save("bert", auto=AutoModel)

    text = refusal(tiny, folder, tiny.task(), label_names=NAMES, tokenizer_size=301)

    assert "the tokenizer has 301 tokens and the model's embedding 300" in text


# RoBERTa's positions start behind its padding id: 64 of them hold 62 tokens.
@pytest.mark.parametrize(("model_type", "longest"), [("bert", 64), ("roberta", 62)])
def test_texts_longer_than_the_positions_are_refused_with_both_numbers(tiny, model_type, longest):
    folder = tiny.save(model_type, num_labels=3)
    fits, too_long = tiny.task(max_length=longest), tiny.task(max_length=longest + 1)

    tiny.load(folder, fits, label_names=NAMES)

    text = refusal(tiny, folder, too_long, label_names=NAMES)
    assert f"task.max_length is {longest + 1} and the model takes at most {longest} tokens" in text


def test_missing_backbone_weights_are_counted_and_three_of_them_named(tiny):
    folder = tiny.save("bert", num_labels=3)
    rewrite(folder, lambda t: {key: t[key] for key in t if "layer.1." not in key})

    text = refusal(tiny, folder, tiny.task(), label_names=NAMES)

    assert "lacks 16 weights of a bert model (bert.encoder.layer.1.attention.self.query" in text
    assert text.count("layer.1.") == 3


def test_shapes_that_differ_are_named_with_both(tiny):
    folder = tiny.save("llama")
    rewrite_config(folder, vocab_size=301)

    text = refusal(tiny, folder, tiny.task("causal_lm"))

    assert "weight of shape [300, 16]" in text
    assert "config asks for [301, 16]" in text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "student.model.config has no model_type"),
        ({"model_type": "bart"}, "model_type 'bart' is not known; use one of bert, roberta"),
        ({"model_type": "llama"}, "'llama' is for causal_lm and cannot do task.type classif"),
        (
            {"model_type": "bert", "hiden_size": 8},
            "hiden_size: no such key in a bert config",
        ),
        ({"model_type": "bert", "hiden_size": 8}, "did you mean hidden_size?"),
        ({"model_type": "bert", "hidden_size": "8"}, "Field 'hidden_size' expected int, got str"),
        ({"model_type": "distilbert", "sinusoidal_pos_embds": True}, "leave it out"),
    ],
    ids=["no type", "unknown", "other task", "key", "nearest", "type", "sinusoidal"],
)
def test_a_scratch_config_that_cannot_be_used_is_refused(tiny, keys, expected):
    with pytest.raises(ModelError) as caught:
        tiny.resolve(ScratchModel(config=keys), tiny.task(), "student.model")

    assert expected in str(caught.value)


def test_a_width_that_the_heads_do_not_divide_is_refused(tiny):
    task = tiny.task()
    source = tiny.resolve(tiny.scratch("bert", hidden_size=15), task, "student.model")

    with pytest.raises(ModelError, match=r"student\.model: no bert model can be built .*15"):
        tiny.load(source, task, label_names=NAMES, need_head=False)


def test_a_folder_that_does_not_exist_is_named(tiny, tmp_path):
    with pytest.raises(ModelError, match=r"teacher\.model: .*absent does not exist"):
        tiny.resolve(tmp_path / "absent", tiny.task())


def test_a_hub_id_that_cannot_be_fetched_is_named_and_a_folder_offered(tiny, monkeypatch):
    asked = {}

    def offline(name, **patterns):
        asked.update(patterns)
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(loading, "snapshot_download", offline)

    with pytest.raises(ModelError, match="org/teacher is neither a folder nor") as caught:
        tiny.resolve("org/teacher", tiny.task())
    assert "offline mode is enabled" in str(caught.value)
    assert "give a folder" in str(caught.value)
    assert not {"*.bin", "*.py"} & set(asked["allow_patterns"])


def test_a_hub_id_is_loaded_from_the_folder_the_hub_gives(tiny, monkeypatch):
    folder = tiny.save("bert", num_labels=3)
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: str(folder))

    source = tiny.resolve("org/teacher", tiny.task())

    assert (source.name, source.folder) == ("org/teacher", folder)


def test_remote_code_is_refused_unless_asked_for_by_name(tiny):
    folder = tiny.save("bert", num_labels=3)
    rewrite_config(folder, model_type="mymodel", auto_map={"AutoConfig": "code.MyConfig"})

    with pytest.raises(ModelError, match=r"set teacher\.trust_remote_code: true"):
        tiny.resolve(folder, tiny.task())
    with pytest.raises(ModelError, match="model_type 'mymodel' is not known; use one of bert"):
        tiny.resolve(folder, tiny.task(), trust_remote_code=True)


def test_quantized_weights_are_refused(tiny):
    folder = tiny.save("llama")
    rewrite_config(folder, quantization_config={"quant_method": "gptq"})

    with pytest.raises(ModelError, match="is quantized"):
        tiny.resolve(folder, tiny.task("causal_lm"))


def test_a_config_file_that_is_absent_or_broken_is_named(tiny):
    folder = tiny.save("bert", num_labels=3)

    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is no model config"):
        tiny.resolve(folder, tiny.task())

    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        tiny.resolve(folder, tiny.task())


def test_weight_files_are_checked_before_the_config(tiny):
    folder = tiny.save("bert", num_labels=3)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (folder / "config.json").unlink()

    with pytest.raises(ModelError, match=r"model\.safetensors is cut short or damaged"):
        tiny.resolve(folder, tiny.task())


def test_the_real_llama_of_the_shared_data_answers_as_transformers_loads_it(tiny, shared_data):
    folder = shared_data / "weights" / "stories260K" / "hf"

    model = tiny.load(folder, tiny.task("causal_lm"))

    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(tiny.input_ids).logits, reference(tiny.input_ids).logits)
