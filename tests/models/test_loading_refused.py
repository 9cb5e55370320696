"""A model that cannot be used gets an error with its name, before anything large is read."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from megakd.config.models import ScratchModel
from megakd.errors import ModelError
from megakd.models import loading
from megakd.models.architectures import FAMILIES
from megakd.models.loading import check_model, load_finished

MASKED = [name for name, entry in FAMILIES.items() if "mlm" in entry.tasks]
NAMES = ("joy", "anger", "fear")


def refusal(tiny, spec, task, where="teacher.model", **changes):
    facts = {"label_names": (), "tokenizer_size": 300, "need_head": True, **changes}
    with pytest.raises(ModelError) as caught:
        check_model(tiny.resolve(spec, task, where), task=task, **facts)
    return str(caught.value)


# RoBERTa's positions start behind its padding id: 64 of them hold 62 tokens.
@pytest.mark.parametrize(("model_type", "longest"), [("bert", 64), ("roberta", 62)])
def test_texts_longer_than_the_positions_are_refused_with_both_numbers(tiny, model_type, longest):
    folder = tiny.save(model_type, id2label=dict(enumerate(NAMES)))
    fits, too_long = tiny.task(max_length=longest), tiny.task(max_length=longest + 1)
    tiny.load(folder, fits, label_names=NAMES)
    text = refusal(tiny, folder, too_long, label_names=NAMES)
    assert f"task.max_length is {longest + 1} and the model takes at most {longest} tokens" in text


@pytest.mark.parametrize(
    ("kind", "keys", "facts", "message"),
    [
        (
            "classification",
            {"num_labels": 3},
            {"label_names": ("a", "b")},
            "the model has 3 labels (LABEL_0, LABEL_1, LABEL_2) and the data 2 (a, b)",
        ),
        ("regression", {"num_labels": 3}, {}, "has 3 outputs and regression needs 1"),
        # Before the head is looked at.
        (
            "classification",
            {"auto": AutoModel},
            {"tokenizer_size": 301},
            "the tokenizer has 301 tokens, and the embedding of the model has 300",
        ),
    ],
    ids=["labels", "outputs", "tokenizer"],
)
def test_a_teacher_that_does_not_fit_task_or_tokenizer_is_refused(tiny, kind, keys, facts, message):
    folder = tiny.save("bert", **keys)
    text = refusal(tiny, folder, tiny.task(kind), **{"label_names": NAMES, **facts})
    assert text.startswith("teacher.model: ")
    assert message in text


@pytest.mark.parametrize(
    ("kind", "stated", "needed"),
    [
        ("classification", "multi_label_classification", "single_label_classification"),
        ("classification", "regression", "single_label_classification"),
        ("regression", "multi_label_classification", "regression"),
    ],
)
def test_a_teacher_whose_outputs_answer_another_question_is_refused(tiny, kind, stated, needed):
    names = NAMES if kind == "classification" else ()
    folder = tiny.save("bert", num_labels=len(names) or 1, problem_type=stated)
    text = refusal(tiny, folder, tiny.task(kind), label_names=names)
    assert f"{folder} has problem_type {stated} in config.json, and task.type {kind}" in text
    assert f"needs {needed}; set teacher.finetune or give a model" in text

    trained = tiny.load(folder, tiny.task(kind), label_names=names, need_head=False)
    masked = tiny.load(folder, tiny.task("mlm"), need_head=False)
    assert (trained.config.problem_type, masked.config.problem_type) == (needed, None)


@pytest.mark.parametrize(
    ("model_type", "auto"),
    [("bert", AutoModel), *((name, AutoModelForSequenceClassification) for name in MASKED)],
)
def test_a_teacher_without_a_masked_head_is_refused(tiny, model_type, auto):
    folder = tiny.save(model_type, auto=auto)
    text = refusal(tiny, folder, tiny.task("mlm"))
    assert f"teacher.model: {folder} has no head for mlm (" in text
    assert "set teacher.finetune or give a folder that was fine-tuned for the task" in text


@pytest.mark.parametrize(
    ("model_type", "need_head"),
    [("llama", False), ("phi", True), ("gpt2", False), ("qwen3_moe", True)],
)
def test_a_decoder_without_its_untied_head_is_refused_with_the_cures(tiny, model_type, need_head):
    tiny.save(model_type, tie_word_embeddings=False)
    tiny.rewrite(lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n})
    text = refusal(tiny, tiny.folder, tiny.task("causal_lm"), need_head=need_head)
    assert (
        f"teacher.model: {tiny.folder} lacks lm_head.weight, and config.json does not tie" in text
    )
    assert "set tie_word_embeddings: true in config.json if the model ties them, or give" in text


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])
def test_a_bare_decoder_that_ties_its_head_has_one(tiny, model_type):
    folder = tiny.save(model_type, auto=AutoModel, tie_word_embeddings=True)
    model = tiny.load(folder, tiny.task("causal_lm"), need_head=False)
    assert torch.equal(
        model.lm_head.weight, AutoModel.from_pretrained(folder).get_input_embeddings().weight
    )


def test_a_finished_model_without_its_head_is_not_opened_with_a_random_one(tiny):
    tiny.save("llama", tie_word_embeddings=False)
    tiny.rewrite(lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n})
    with pytest.raises(
        ModelError, match=r"MODEL: .* lacks lm_head\.weight; give a folder with all weights"
    ):
        load_finished(tiny.folder, "MODEL")


def test_missing_backbone_weights_are_counted_and_three_of_them_named(tiny):
    folder = tiny.save("bert", id2label=dict(enumerate(NAMES)))
    tiny.rewrite(lambda t: {key: t[key] for key in t if "layer.1." not in key})
    text = refusal(tiny, folder, tiny.task(), label_names=NAMES)
    assert "lacks 16 weights of a bert model (bert.encoder.layer.1.attention.self.query" in text
    assert text.count("layer.1.") == 3


def test_a_folder_of_adapters_alone_is_refused_with_what_to_do(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has adapters alone .*; merge them into their model"):
        tiny.resolve(tmp_path, tiny.task("causal_lm"), with_weights=False)


def test_shapes_that_differ_are_named_with_both(tiny):
    folder = tiny.save("llama")
    tiny.rewrite_config(vocab_size=301)
    text = refusal(tiny, folder, tiny.task("causal_lm"))
    assert "weight of shape [300, 16]" in text
    assert "config.json requires [301, 16]" in text


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "student.model.config has no model_type"),
        ({"model_type": "brt"}, 'has no brt; did you mean "bert"?'),
        ({"model_type": "bert", "hidden_size": "8"}, "Field 'hidden_size' expected int, got str"),
        (
            {"model_type": "distilbert", "sinusoidal_pos_embds": True},
            "remove the key to use learned positions",
        ),
    ],
    ids=["no type", "unknown type", "type", "sinusoidal"],
)
def test_a_scratch_config_that_cannot_be_used_is_refused(tiny, keys, expected):
    with pytest.raises(ModelError) as caught:
        tiny.resolve(ScratchModel(config=keys), tiny.task(), "student.model")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("bert", {"_attn_implementation_autoset": True, "unk_token_id": 1}),
        ("llama", {"_attn_implementation": "eager", "_name_or_path": "x", "_commit_hash": "x"}),
        ("qwen3_moe", {"_experts_implementation": "eager"}),
        ("phi", {"partial_rotary_factor": 0.25}),
        ("gemma3_text", {"sliding_window_pattern": 2, "_sliding_window_pattern": 2}),
        ("deberta-v2", {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "conv_act": "gelu"}),
    ],
)
def test_what_files_hold_and_classes_read_is_no_misspelled_key(tiny, model_type, keys):
    spec = ScratchModel(config={"model_type": model_type, "num_hidden_layers": 2, **keys})
    source = tiny.resolve(spec, tiny.task_for(model_type), "student.model")
    assert source.config._attn_implementation == keys.get("_attn_implementation")
    assert (getattr(source.config, "layer_types", None) or ["-"])[-1] in ("full_attention", "-")


@pytest.mark.parametrize("key", ["_hidden_sizes", "_made_up", "rope_local_base_freq"])
def test_a_key_that_no_file_has_and_no_class_reads_is_refused(tiny, key):
    with pytest.raises(ModelError, match=rf"student\.model\.config\.{key}: unknown key of a llama"):
        tiny.resolve(tiny.scratch("llama", **{key: 3}), tiny.task("causal_lm"), "student.model")


def test_a_key_that_the_code_of_a_family_reads_shapes_its_model(tiny):
    """DeBERTa-v3 has buckets of positions, which are no key of its config class."""
    spec = tiny.scratch("deberta-v2", relative_attention=True, position_buckets=8)

    model = tiny.load(spec, tiny.task(), label_names=("a", "b"), need_head=False)

    assert len(model.deberta.encoder.rel_embeddings.weight) == 2 * 8


def test_a_type_whose_config_has_no_defaults_is_refused(tiny):
    spec = ScratchModel(config={"model_type": "gemma4_assistant"})

    with pytest.raises(
        ModelError, match=r"student\.model\.config: a gemma4_assistant config has no"
    ):
        tiny.resolve(spec, tiny.task("causal_lm"), "student.model")


def test_a_head_width_is_known_to_decoders_whose_config_has_none(tiny):
    keys = {"model_type": "qwen3_moe", "hidden_size": 16, "num_attention_heads": 4, "head_dim": 8}
    source = tiny.resolve(ScratchModel(config=keys), tiny.task("causal_lm"), "student.model")
    assert source.config.head_dim == 8


def test_a_model_that_transformers_cannot_build_is_refused_with_its_words(tiny):
    spec = tiny.scratch("bert", hidden_act="nosuch")
    with pytest.raises(
        ModelError, match=r"student\.model\.config: a bert .*cannot be built .*nosuch"
    ):
        tiny.resolve(spec, tiny.task(), "student.model")


def test_a_hub_id_that_cannot_be_fetched_is_named_and_a_folder_offered(tiny, monkeypatch):
    def offline(name, **patterns):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(loading, "snapshot_download", offline)

    with pytest.raises(ModelError, match="org/teacher is not a local folder and") as caught:
        tiny.resolve("org/teacher", tiny.task())
    assert "offline mode is enabled" in str(caught.value)
    assert "give a folder" in str(caught.value)


def test_remote_code_is_refused_unless_asked_for_by_name(tiny):
    folder = tiny.save("bert", id2label=dict(enumerate(NAMES)))
    tiny.rewrite_config(model_type="mymodel", auto_map={"AutoConfig": "code.MyConfig"})

    with pytest.raises(ModelError, match=r"set teacher\.trust_remote_code: true"):
        tiny.resolve(folder, tiny.task())
    with pytest.raises(ModelError, match=r"does not appear to have a file named code\.py"):
        tiny.resolve(folder, tiny.task(), trust_remote_code=True)


def test_a_folder_or_a_config_file_that_is_absent_or_broken_is_named(tiny, tmp_path):
    folder = tiny.save("bert", id2label=dict(enumerate(NAMES)))

    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not a model config"):
        tiny.resolve(folder, tiny.task())

    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        tiny.resolve(folder, tiny.task())

    (folder / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Is a directory"):
        tiny.resolve(folder, tiny.task())

    with pytest.raises(ModelError, match=r"teacher\.model: .*absent does not exist"):
        tiny.resolve(tmp_path / "absent", tiny.task())


def test_weight_files_are_checked_before_the_config(tiny):
    folder = tiny.save("bert", id2label=dict(enumerate(NAMES)))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    (folder / "config.json").unlink()

    with pytest.raises(
        ModelError, match=r"model\.safetensors \(\d+ bytes\) is cut short or damaged"
    ):
        tiny.resolve(folder, tiny.task())


def test_whole_numbers_in_the_place_of_weights_are_refused_with_their_name(tiny):
    folder = tiny.save("bert", id2label=dict(enumerate(NAMES)))
    name = "bert.encoder.layer.0.output.dense.weight"
    tiny.rewrite(lambda tensors: {**tensors, name: tensors[name].mul(100).to(torch.int8)})

    text = refusal(tiny, folder, tiny.task(), label_names=NAMES)

    assert f"model.safetensors holds {name} as int8" in text
    assert "give the model in fp32, bf16 or fp16" in text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"id2label": ["a", "b"]}, "a value has the wrong form"),
        ({"dtype": "float17"}, "a value has the wrong form .*float17"),
        ({"model_type": ["bert"]}, r"model_type must be a text, such as bert \(got \['bert'\]\)"),
    ],
)
def test_a_wrong_value_in_a_config_file_is_refused_with_the_file(tiny, keys, message):
    folder = tiny.save("bert", num_labels=2)
    tiny.rewrite_config(**keys)
    with pytest.raises(ModelError, match=rf"teacher\.model: .*config\.json: {message}"):
        tiny.resolve(folder, tiny.task())


def test_labels_as_a_list_are_refused_for_a_model_from_scratch(tiny):
    spec = tiny.scratch("bert", id2label=["a", "b"])
    with pytest.raises(ModelError, match=r"student\.model\.config: .*id2label is a mapping"):
        tiny.resolve(spec, tiny.task(), "student.model")


def test_a_roberta_without_a_padding_token_is_refused(tiny):
    folder = tiny.save("roberta", num_labels=2)
    tiny.rewrite_config(pad_token_id=None)
    spec = tiny.scratch("roberta", pad_token_id=None)
    facts = {"label_names": ("a", "b"), "need_head": False}

    of_folder = refusal(tiny, folder, tiny.task(), **facts)
    of_scratch = refusal(tiny, spec, tiny.task(), "student.model", **facts)

    answer = (
        "pad_token_id must be a whole number (got None), because a roberta model counts positions"
    )
    assert f"teacher.model: {folder / 'config.json'}: {answer}" in of_folder
    assert f"student.model.config: {answer}" in of_scratch


def test_the_hub_is_asked_for_chat_templates_and_for_no_code_pickle_or_second_weights(
    tiny, monkeypatch
):
    asked = {}
    folder = tiny.save("bert", id2label=dict(enumerate(NAMES)))
    monkeypatch.setattr(
        loading, "snapshot_download", lambda _, **patterns: asked.update(patterns) or str(folder)
    )

    source = tiny.resolve("org/teacher", tiny.task())

    assert (source.name, source.folder) == ("org/teacher", folder)
    assert "*.jinja" in asked["allow_patterns"]
    assert not {"*.bin", "*.py"} & set(asked["allow_patterns"])
    assert "consolidated*.safetensors" in asked["ignore_patterns"]


def test_a_finished_folder_of_an_unknown_architecture_is_named(tiny):
    folder = tiny.save("bert")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"architectures": ["Novel"]}))

    with pytest.raises(ModelError, match=r"config\.json names the architecture 'Novel'"):
        load_finished(folder, "latency")
