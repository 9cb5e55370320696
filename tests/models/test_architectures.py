import pytest
from transformers import BartConfig

from megakd.errors import ModelError
from megakd.models.architectures import (
    ARCHITECTURES,
    MASKED_HEADS,
    architecture_named,
    architecture_of,
)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_map_says_where_the_parts_of_a_model_are(tiny, model_type):
    model = tiny.load(tiny.scratch(model_type), tiny.task_for(model_type), need_head=False)

    architecture = architecture_of(model.config)
    backbone, head = architecture.backbone_of(model), architecture.head_of(model)
    outputs = backbone(tiny.input_ids, output_hidden_states=True)

    assert len(outputs.hidden_states) == architecture.number_of_layers(model.config) + 1 == 3
    assert outputs.last_hidden_state.shape[-1] == architecture.hidden_width(model.config) == 16
    theirs = {id(p) for p in (*backbone.parameters(), *head.parameters())}
    rest = [name for name, p in model.named_parameters() if id(p) not in theirs]
    assert all(architecture.of_the_task(name) for name in rest)


@pytest.mark.parametrize("model_type", MASKED_HEADS)
def test_the_map_says_what_belongs_to_a_masked_language_model(tiny, model_type):
    task = tiny.task("mlm")
    model = tiny.load(tiny.scratch(model_type), task, need_head=False)

    architecture = architecture_named(model_type, "mlm")
    backbone = architecture.backbone_of(model)

    assert architecture.head_of(model) is model.get_output_embeddings()
    theirs = {id(p) for p in backbone.parameters()}
    rest = [name for name, p in model.named_parameters() if id(p) not in theirs]
    assert rest
    assert all(architecture.of_the_task(name) for name in rest)
    inside = [n for n, p in model.named_parameters() if id(p) in theirs]
    assert not any(architecture.of_the_task(name) for name in inside)


def test_a_pooler_and_a_head_belong_to_the_task_and_a_layer_does_not():
    bert = ARCHITECTURES["bert"]

    assert bert.of_the_task("classifier.weight")
    assert bert.of_the_task("bert.pooler.dense.bias")
    assert not bert.of_the_task("bert.encoder.layer.0.output.dense.weight")


def test_an_unknown_family_is_an_error_that_names_those_known():
    with pytest.raises(ModelError, match=r"'bart' is not known; use one of bert, .*llama"):
        architecture_of(BartConfig())


def test_a_family_that_cannot_do_the_task_is_an_error_that_names_those_that_can():
    with pytest.raises(ModelError, match=r"task\.type causal_lm; use one of llama, mistral, qwen2"):
        architecture_named("bert", "causal_lm")
    with pytest.raises(
        ModelError, match=r"task\.type mlm; use one of bert, roberta, distilbert, e"
    ):
        architecture_named("llama", "mlm")
