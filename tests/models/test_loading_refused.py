"""A model that cannot be used gets an error with its name, before anything large is read."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from cut_families import FAMILIES
from transformers import AutoModel, AutoModelForSequenceClassification

from megakd.config.sections import ScratchModel
from megakd.errors import ModelError
from megakd.models import loading
from megakd.models.loading import check_model, load_finished

MASKED = [name for name, entry in FAMILIES.items() if "mlm" in entry.tasks]
NAMES = ("joy", "anger", "fear")
NAMED = {"id2label": dict(enumerate(NAMES))}
NO_PADDING = "pad_token_id must be a whole number (got None), because a roberta model counts"


def refusal(tiny, spec, task, where="teacher.model", **changes):
    facts = {"label_names": (), "tokenizer_size": 300, "need_head": True, **changes}
    with pytest.raises(ModelError) as caught:
        check_model(tiny.resolve(spec, task, where), task=task, **facts)
    return str(caught.value)


# RoBERTa's positions start behind its padding id: 64 of them hold 62 tokens.
@pytest.mark.parametrize(("model_type", "longest"), [("bert", 64), ("roberta", 62)])
def test_texts_longer_than_the_positions_are_refused_with_both_numbers(tiny, model_type, longest):
    folder = tiny.save(model_type, **NAMED)
    fits, too_long = tiny.task(max_length=longest), tiny.task(max_length=longest + 1)
    tiny.load(folder, fits, label_names=NAMES)
    text = refusal(tiny, folder, too_long, label_names=NAMES)
    assert f"task.max_length is {longest + 1} and the model takes at most {longest} tokens" in text


def without(*parts):
    """The change of a folder that removes the weights whose names have one of these parts."""
    return lambda tiny: tiny.rewrite(
        lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}
    )


def whole_numbers(tiny):
    name = "bert.encoder.layer.0.output.dense.weight"
    tiny.rewrite(lambda tensors: {**tensors, name: tensors[name].mul(100).to(torch.int8)})


def says(**keys):
    """The change of a folder whose config says something else."""
    return lambda tiny: tiny.rewrite_config(**keys)


class Unfit(NamedTuple):
    """A saved model, what is changed in its folder, and what a run of a task says of it."""

    model_type: str
    keys: dict[str, Any]
    kind: str
    message: str
    change: Callable[[Any], None] = lambda _: None
    facts: Mapping[str, Any] = MappingProxyType({})


NO_HEAD = "has no head for mlm ( … set teacher.finetune or give a folder that was fine-tuned for"
TWO = {"label_names": ("a", "b")}
COUNTS = "the model has 3 labels (LABEL_0, LABEL_1, LABEL_2) and the data 2 (a, b)"
LACKS = "lacks 16 weights of a bert model (bert.encoder.layer.1.attention.self.query"
INT8 = "model.safetensors holds bert.encoder.layer.0.output.dense.weight as int8 … give the model "
INT8 += "in fp32, bf16 or fp16"
SHAPES = "weight of shape [300, 16] … config.json requires [301, 16]"
TOKENS = "the tokenizer has 301 tokens, and the embedding of the model has 300"
BARE, CLASSIFIER = {"auto": AutoModel}, {"auto": AutoModelForSequenceClassification}
UNFIT = [
    Unfit("bert", {"num_labels": 3}, "classification", COUNTS, facts=TWO),
    Unfit("bert", {"num_labels": 3}, "regression", "has 3 outputs and regression needs 1"),
    # Before the head is looked at.
    Unfit("bert", BARE, "classification", TOKENS, facts={"tokenizer_size": 301}),
    Unfit("bert", BARE, "mlm", NO_HEAD),
    *(Unfit(name, CLASSIFIER, "mlm", NO_HEAD) for name in MASKED),
    Unfit("bert", NAMED, "classification", LACKS, without("layer.1.")),
    Unfit("bert", NAMED, "classification", INT8, whole_numbers),
    Unfit("llama", {}, "causal_lm", SHAPES, says(vocab_size=301), {"label_names": ()}),
    Unfit(
        "roberta", NAMED, "classification", f"config.json: {NO_PADDING}", says(pad_token_id=None)
    ),
]


@pytest.mark.parametrize("unfit", UNFIT, ids=lambda unfit: f"{unfit.model_type} {unfit.kind}")
def test_a_teacher_that_does_not_fit_the_run_or_its_own_config_is_refused(tiny, unfit):
    folder = tiny.save(unfit.model_type, **unfit.keys)
    unfit.change(tiny)

    text = refusal(tiny, folder, tiny.task(unfit.kind), **{"label_names": NAMES, **unfit.facts})

    assert text.startswith("teacher.model: ")
    for part in unfit.message.split(" … "):
        assert part in text
    assert text.count("layer.1.") <= 3  # of many weights, three are named


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


@pytest.mark.parametrize(("model_type", "need_head"), [("llama", False), ("gpt2", True)])
def test_a_decoder_without_its_untied_head_is_refused_with_the_cures(tiny, model_type, need_head):
    folder = tiny.save(model_type, tie_word_embeddings=False)
    without("lm_head")(tiny)
    text = refusal(tiny, folder, tiny.task("causal_lm"), need_head=need_head)
    assert f"teacher.model: {folder} lacks lm_head.weight, and config.json does not tie" in text
    assert "set tie_word_embeddings: true in config.json if the model ties them, or give" in text
    # A finished model is not opened with a random one.
    all_weights = r"MODEL: .* lacks lm_head\.weight; give a folder with all weights"
    with pytest.raises(ModelError, match=all_weights):
        load_finished(folder, "MODEL")


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_bare_decoder_that_ties_its_head_has_one(tiny, model_type):
    folder = tiny.save(model_type, auto=AutoModel, tie_word_embeddings=True)
    model = tiny.load(folder, tiny.task("causal_lm"), need_head=False)
    assert torch.equal(
        model.lm_head.weight, AutoModel.from_pretrained(folder).get_input_embeddings().weight
    )


def test_a_folder_of_adapters_alone_is_refused_with_what_to_do(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has adapters alone .*; merge them into their model"):
        tiny.resolve(tmp_path, tiny.task("causal_lm"), with_weights=False)


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        (None, {}, r"\.config has no model_type"),
        ("brt", {}, r'\.config.* has no brt; did you mean "bert"\?'),
        ("bert", {"hidden_size": "8"}, "Field 'hidden_size' expected int, got str"),
        ("distilbert", {"sinusoidal_pos_embds": True}, "remove the key to use learned positions"),
        ("bert", {"hidden_act": "nosuch"}, r"\.config: a bert .*cannot be built .*nosuch"),
        ("bert", {"id2label": ["a", "b"]}, r"\.config: .*id2label is a mapping"),
        ("gemma4_assistant", {}, r"\.config: a gemma4_assistant config has no"),
        ("roberta", {"pad_token_id": None}, rf"\.config: {re.escape(NO_PADDING)}"),
        # Keys that no file has and no class reads.
        *(
            ("llama", {key: 3}, rf"\.config\.{key}: unknown key of a llama")
            for key in ("_hidden_sizes", "_made_up", "rope_local_base_freq")
        ),
    ],
)
def test_a_scratch_config_that_cannot_be_used_is_refused(tiny, model_type, keys, message):
    named = {} if model_type is None else {"model_type": model_type}
    task = tiny.task("causal_lm" if model_type in ("llama", "gemma4_assistant") else "mlm")
    spec = ScratchModel(config={**named, **keys})
    text = refusal(tiny, spec, task, "student.model", need_head=False)
    assert re.search(rf"^student\.model.*{message}", text), text


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


def test_a_key_that_the_code_of_a_family_reads_shapes_its_model(tiny):
    """DeBERTa-v3 has buckets of positions, which are no key of its config class."""
    spec = tiny.scratch("deberta-v2", relative_attention=True, position_buckets=8)

    model = tiny.load(spec, tiny.task(), label_names=("a", "b"), need_head=False)

    assert len(model.deberta.encoder.rel_embeddings.weight) == 2 * 8


def test_a_head_width_is_known_to_decoders_whose_config_has_none(tiny):
    keys = {"model_type": "qwen3_moe", "hidden_size": 16, "num_attention_heads": 4, "head_dim": 8}
    source = tiny.resolve(ScratchModel(config=keys), tiny.task("causal_lm"), "student.model")
    assert source.config.head_dim == 8


def test_a_head_width_that_no_code_reads_is_not_that_of_the_heads(tiny):
    for model_type, is_read in (("bert", False), ("qwen2", True)):
        folder, task = tiny.save(model_type), tiny.task_for(model_type)
        before = tiny.resolve(folder, task).heads
        tiny.rewrite_config(head_dim=2 * before.width)

        heads = tiny.resolve(folder, task, with_weights=False).heads

        assert heads.width == (2 if is_read else 1) * before.width


def test_a_hub_id_that_cannot_be_fetched_is_named_and_a_folder_offered(tiny, monkeypatch):
    def offline(name, **patterns):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(loading, "snapshot_download", offline)

    named = "(?s)org/teacher is not a local folder and.*offline mode is enabled.*give a folder"
    with pytest.raises(ModelError, match=named):
        tiny.resolve("org/teacher", tiny.task())


def test_remote_code_is_refused_unless_asked_for_by_name(tiny):
    folder = tiny.save("bert", **NAMED)
    tiny.rewrite_config(model_type="mymodel", auto_map={"AutoConfig": "code.MyConfig"})

    with pytest.raises(ModelError, match=r"set teacher\.trust_remote_code: true"):
        tiny.resolve(folder, tiny.task())
    with pytest.raises(ModelError, match=r"does not appear to have a file named code\.py"):
        tiny.resolve(folder, tiny.task(), trust_remote_code=True)


def test_a_folder_or_a_config_file_that_is_absent_or_broken_is_named(tiny, tmp_path):
    config = tiny.save("bert") / "config.json"

    def refused(message, folder=tiny.folder):
        with pytest.raises(ModelError, match=message):
            tiny.resolve(folder, tiny.task())

    config.write_text("{")
    refused(r"config\.json is not a model config")
    config.unlink()
    refused(r"config\.json does not exist")
    config.mkdir()
    refused(r"config\.json cannot be read: Is a directory")
    refused(r"teacher\.model: .*absent does not exist", tmp_path / "absent")
    # Weight files are checked first.
    file = tiny.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(r"model\.safetensors \(\d+ bytes\) is cut short or damaged")


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


def test_the_hub_is_asked_for_chat_templates_and_for_no_code_pickle_or_second_weights(
    tiny, monkeypatch
):
    asked = {}
    folder = tiny.save("bert", **NAMED)
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
    tiny.rewrite_config(architectures=["Novel"])

    with pytest.raises(ModelError, match=r"config\.json names the architecture 'Novel'"):
        load_finished(folder, "latency")
