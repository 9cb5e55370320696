"""Model configs with values of the wrong form, what the Hub is asked for, and counted weights."""

import pytest
from transformers import ElectraConfig, ElectraForMaskedLM

from megakd.config.models import ScratchModel
from megakd.errors import ModelError
from megakd.models import loading
from megakd.models.axes import named_shapes, parameter_counts
from megakd.models.loading import check_model


def saved_with(tiny, family, **keys):
    folder = tiny.save(family, num_labels=2)
    tiny.rewrite_config(**keys)
    return folder


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"id2label": ["a", "b"]}, "a value has the wrong form"),
        ({"dtype": "float17"}, "a value has the wrong form .*float17"),
        ({"model_type": ["bert"]}, r"model_type must be a text, such as bert \(got \['bert'\]\)"),
    ],
)
def test_a_wrong_value_in_a_config_file_is_refused_with_the_file(tiny, keys, message):
    folder = saved_with(tiny, "bert", **keys)
    with pytest.raises(ModelError, match=rf"teacher\.model: .*config\.json: {message}"):
        tiny.resolve(folder, tiny.task())


def test_labels_as_a_list_are_refused_for_a_model_from_scratch(tiny):
    spec = tiny.scratch("bert", id2label=["a", "b"])
    with pytest.raises(ModelError, match=r"student\.model\.config: .*id2label is a mapping"):
        tiny.resolve(spec, tiny.task(), "student.model")


def test_a_folder_in_the_place_of_a_config_file_is_refused(tiny):
    folder = tiny.save("bert", num_labels=2)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read: Is a directory"):
        tiny.resolve(folder, tiny.task())


def refusal_without_padding(tiny, spec, where):
    source = tiny.resolve(spec, tiny.task(), where)
    with pytest.raises(ModelError) as caught:
        check_model(
            source, task=tiny.task(), label_names=("a", "b"), tokenizer_size=300, need_head=False
        )
    return str(caught.value)


def test_a_roberta_without_a_padding_token_is_refused(tiny):
    folder = saved_with(tiny, "roberta", pad_token_id=None)
    keys = tiny.scratch("roberta").config | {"pad_token_id": None}

    of_folder = refusal_without_padding(tiny, folder, "teacher.model")
    of_scratch = refusal_without_padding(tiny, ScratchModel(config=keys), "student.model")

    answer = (
        "pad_token_id must be a whole number (got None), because a roberta model counts positions"
    )
    assert f"teacher.model: {folder / 'config.json'}: {answer}" in of_folder
    assert f"student.model.config: {answer}" in of_scratch


def test_the_hub_is_asked_for_chat_templates_and_not_for_the_weights_twice(tiny, monkeypatch):
    asked = {}
    folder = tiny.save("bert", num_labels=3)
    monkeypatch.setattr(
        loading, "snapshot_download", lambda _, **patterns: asked.update(patterns) or str(folder)
    )

    source = tiny.resolve("org/teacher", tiny.task())

    assert (source.name, source.folder) == ("org/teacher", folder)
    assert "*.jinja" in asked["allow_patterns"]
    assert "consolidated*.safetensors" in asked["ignore_patterns"]


def test_the_output_bias_of_a_masked_electra_is_not_counted_with_its_encoder():
    sizes = {"hidden_size": 16, "embedding_size": 16, "intermediate_size": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    model = ElectraForMaskedLM(ElectraConfig(vocab_size=1000, **sizes, **layers))

    counts = parameter_counts(named_shapes(model))

    inside = sum(parameter.numel() for parameter in model.electra.encoder.parameters())
    assert counts.encoder_parameters == inside
