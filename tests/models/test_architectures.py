import pytest
from transformers import BartConfig

from megakd.errors import ModelError
from megakd.models.architectures import FAMILIES, MASKED_HEADS, architecture_named, architecture_of

CUTTABLE = [name for name, entry in FAMILIES.items() if entry.uncut is None]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_map_says_where_the_parts_of_a_model_are(tiny, model_type):
    model = tiny.load(tiny.scratch(model_type), tiny.task_for(model_type), need_head=False)

    architecture = architecture_of(model.config)
    backbone, head = architecture.backbone_of(model), model.get_submodule(architecture.head)
    outputs = backbone(tiny.input_ids, output_hidden_states=True)

    assert len(outputs.hidden_states) == architecture.number_of_layers(model.config) + 1 == 3
    assert outputs.last_hidden_state.shape[-1] == architecture.hidden_width(model.config) == 16
    theirs = {id(p) for p in (*backbone.parameters(), *head.parameters())}
    rest = [name for name, p in model.named_parameters() if id(p) not in theirs]
    # EncT5's decoder layer stands between its backbone and its head.
    rest = [name for name in rest if not name.startswith(("decoder.block", "decoder.final"))]
    assert all(architecture.of_the_task(name) for name in rest)


@pytest.mark.parametrize("model_type", CUTTABLE)
def test_the_map_lists_the_modules_of_every_attention_and_feed_forward(tiny, model_type):
    model = tiny.load(tiny.scratch(model_type), tiny.task_for(model_type), need_head=False)
    architecture = architecture_of(model.config)

    attentions = architecture.attentions(model.config)
    feed_forwards = architecture.feed_forwards(model.config)

    more = 2 if model_type == "enct5" else 0
    assert (len(attentions), len(feed_forwards)) == (2 + more, 2 + more // 2)
    listed = [path for a in attentions for path in (*dict.fromkeys(a.projections), a.output)]
    listed += [path for f in feed_forwards for path in (*f.inputs, f.output)]
    assert len({*listed}) == len(listed)
    matrices = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.dim() == 2}
    assert matrices >= {*listed}
    cores = tuple(f"{paths.core}." for paths in attentions)
    assert all("bias" in path for path in matrices - {*listed} if path.startswith(cores))


def test_gpt2s_config_may_leave_its_neurons_open(tiny):
    config = tiny.resolve(tiny.scratch("gpt2", n_inner=None), tiny.task("causal_lm")).config
    assert architecture_of(config).units(config).neurons == (64, 64)


@pytest.mark.parametrize("model_type", MASKED_HEADS)
def test_the_map_says_what_belongs_to_a_masked_language_model(tiny, model_type):
    task = tiny.task("mlm")
    model = tiny.load(tiny.scratch(model_type), task, need_head=False)

    architecture = architecture_named(model_type, "mlm")
    backbone = architecture.backbone_of(model)

    assert model.get_submodule(architecture.head) is model.get_output_embeddings()
    theirs = {id(p) for p in backbone.parameters()}
    rest = [name for name, p in model.named_parameters() if id(p) not in theirs]
    assert rest
    assert all(architecture.of_the_task(name) for name in rest)
    inside = [n for n, p in model.named_parameters() if id(p) in theirs]
    assert not any(architecture.of_the_task(name) for name in inside)


def test_an_unknown_family_is_an_error_that_names_those_known_and_says_what_to_write_where():
    with pytest.raises(ModelError) as caught:
        architecture_of(BartConfig())

    text = str(caught.value)
    assert "'bart' is not supported; use one of bert, " in text
    assert "add the family to FAMILIES in megakd/models/architectures.py" in text
    assert "an Architecture with model_type, tasks, backbone, head, and, where" in text
    assert "attention, feed_forward," in text


def test_a_family_that_cannot_do_the_task_is_an_error_that_names_those_that_can():
    with pytest.raises(ModelError, match=r"task\.type causal_lm; use one of llama, mistral, qwen2"):
        architecture_named("bert", "causal_lm")
    with pytest.raises(
        ModelError, match=r"task\.type mlm; use one of bert, roberta, distilbert, e"
    ):
        architecture_named("llama", "mlm")
