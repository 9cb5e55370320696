"""Two tables say where the parts of a model are, and what of a weight belongs to which units."""

from __future__ import annotations

import pytest
import tiny_cuts
import torch
from cut_families import FAMILIES
from transformers import AutoModelForMaskedLM, ElectraConfig, ElectraForMaskedLM

from megakd.models.architectures import AUTO_CLASSES
from megakd.models.cutting import cut_config
from megakd.models.elastic import unit_makers, weight_axes
from megakd.models.proposed_units import WIDTH, cut_part
from megakd.models.structure import architecture_of, for_task, parameter_counts
from megakd.models.views import Axis, Cut, UnitOrder, View

MASKED = [name for name, entry in FAMILIES.items() if "mlm" in entry.tasks]
WITH_TASKS = [
    *(
        (name, "causal_lm" if "causal_lm" in e.tasks else "classification")
        for name, e in FAMILIES.items()
    ),
    *((name, "mlm") for name in MASKED),
]


def whole(tiny, model_type, kind="", **changes):
    """A model whose values are all random, and more than one head to sort in every family."""
    groups = {"num_key_value_heads": 2, "num_attention_heads": 4}
    keys = groups if "num_key_value_heads" in tiny.keys(model_type) else {}
    auto = AutoModelForMaskedLM if kind == "mlm" else None
    folder = tiny.save(model_type, auto=auto, **{**keys, **changes})
    task = tiny.task(kind) if kind else tiny.task_for(model_type)
    return tiny.load(folder, task)


def turn(count, by):
    return tuple((unit + by) % count for unit in range(count))


def units_of(model):
    return architecture_of(model.config).units(model.config)


@pytest.mark.parametrize(("model_type", "kind"), WITH_TASKS)
def test_putting_all_units_in_another_order_leaves_the_outputs_as_they_were(tiny, model_type, kind):
    model = whole(tiny, model_type, kind)
    axes, units = weight_axes(model), units_of(model)
    # Every unit in another place, in every layer another way round.
    heads, neurons = (
        tuple(turn(count, 1 - number % 2 * 2) for number, count in enumerate(counts))
        for counts in (units.heads, units.neurons)
    )
    order = UnitOrder(heads=heads, neurons=neurons, width=turn(units.width, 5))
    config = cut_config(model.config, units, order)
    other = AUTO_CLASSES[kind].from_config(config).eval()
    state = {
        name: cut_part(tensor, axes[name], Cut(order, None)) if name in axes else tensor
        for name, tensor in model.state_dict().items()
    }

    other.load_state_dict(state)

    mask = torch.ones_like(tiny.input_ids)
    mask[1, 9:] = 0
    ours, theirs = (m(input_ids=tiny.input_ids, attention_mask=mask) for m in (model, other))
    torch.testing.assert_close(theirs.logits[mask[:, 0] > 0], ours.logits, atol=2e-5, rtol=1e-4)
    moved = {name for name, value in model.state_dict().items() if (value != state[name]).any()}
    assert moved >= axes.keys()


# As many classes, tokens or columns as the layers are wide, and heads as wide as a layer.
@pytest.mark.parametrize(
    ("model_type", "keys", "name", "expected"),
    [
        ("bert", {"num_labels": 16}, "classifier.weight", (None, WIDTH)),
        ("roberta", {"num_labels": 16}, "classifier.out_proj.weight", (None, WIDTH)),
        ("roberta", {"num_labels": 16}, "classifier.dense.weight", (WIDTH, WIDTH)),
        ("electra", {"num_labels": 16}, "classifier.out_proj.bias", None),
        ("distilbert", {"num_labels": 16}, "classifier.bias", None),
        (
            "distilbert",
            {"max_position_embeddings": 32, "dim": 32},
            "distilbert.embeddings.position_embeddings.weight",
            (None, WIDTH),
        ),
        ("qwen3", {"head_dim": 16}, "model.layers.0.self_attn.q_norm.weight", None),
        ("qwen3", {"head_dim": 16}, "model.layers.0.self_attn.k_norm.weight", None),
        (
            "enct5",
            {"num_heads": 16},
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            None,
        ),
        ("enct5", {}, "decoder.embed_tokens.weight", (None, WIDTH)),
        ("gpt2", {}, "transformer.h.0.attn.c_attn.bias", (Axis("heads", 0, 8, 3),)),
    ],
)
def test_sizes_that_are_equal_by_chance_are_told_apart(tiny, model_type, keys, name, expected):
    model = whole(tiny, model_type, **keys)
    assert name in dict(model.named_parameters())
    assert weight_axes(model).get(name) == expected


def test_a_view_lies_within_another_that_has_as_much_everywhere():
    large, small = View((2, 2), (8, 8), 4), View((2, 0), (8, 1), 4)
    assert small.within(large)
    assert small.within(small)
    assert not large.within(small)


@pytest.mark.parametrize("width", [16, 24])
def test_narrow_embeddings_and_the_matrix_that_raises_them_make_the_hidden_states(width):
    model = tiny_cuts.build("electra", embedding_size=width)

    makers = unit_makers(model)

    embeddings = [name for name in makers if "embeddings" in name]
    layers_run_narrow = width < model.config.hidden_size
    assert ("electra.embeddings_project.weight" in embeddings) == layers_run_narrow
    assert ("electra.embeddings.word_embeddings.weight" in embeddings) != layers_run_narrow


def test_the_output_bias_of_a_masked_electra_is_not_counted_with_its_encoder():
    sizes = {"hidden_size": 16, "embedding_size": 16, "intermediate_size": 16}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    model = ElectraForMaskedLM(ElectraConfig(vocab_size=1000, **sizes, **layers))
    for_task(model.config, "mlm")

    counts = parameter_counts(model)

    inside = sum(parameter.numel() for parameter in model.electra.encoder.parameters())
    assert counts.encoder_parameters == inside


@pytest.mark.parametrize(("model_type", "kind"), WITH_TASKS)
def test_the_map_says_where_the_parts_of_a_model_are(tiny, model_type, kind):
    model = tiny.load(tiny.scratch(model_type), tiny.task(kind), need_head=False)

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
    # A pooler is inside of the backbone, and belongs to classes.
    inside = [name for name, _ in backbone.named_parameters(prefix=architecture.backbone)]
    assert kind != "mlm" or not any(architecture.of_the_task(name) for name in inside)


def test_gpt2s_config_may_leave_its_neurons_open(tiny):
    config = tiny.resolve(tiny.scratch("gpt2", n_inner=None), tiny.task("causal_lm")).config
    assert architecture_of(config).units(config).neurons == (64, 64)
