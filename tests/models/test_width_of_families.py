"""Families without an entry lose neurons and heads where a small copy shows that they can."""

from __future__ import annotations

import copy

import pytest
import tiny_families
import torch
from transformers import AutoConfig, AutoModel

from megakd.errors import ModelError
from megakd.models.architectures import AUTO_CLASSES
from megakd.models.cutting import content_of, cut_config, why_rigid
from megakd.models.elastic import Elastic, weight_axes
from megakd.models.loading import load_finished
from megakd.models.model_folder import brings_code, write_model_folder
from megakd.models.proposed_units import WIDTH, cut_part
from megakd.models.small_copy import no_cache
from megakd.models.structure import architecture_of, find_architecture, for_task
from megakd.models.units import find_units
from megakd.models.views import Cut, UnitOrder, View

BOTH = """
    apertus arcee cohere cohere2 cwm ernie4_5 exaone4 falcon_h1 flint gemma glm glm4 granite_swa
    hunyuan_v1_dense hyperclovax internlm3 jais2 lfm2 ministral nanochat nemotron olmo seed_oss
    smollm3 starcoder2 vaultgemma phi3 gpt_neox biogpt gemma4_unified_text minicpm3
""".split()  # noqa: SIM905
NEURONS = "bart bloom diffllama falcon mpt olmo2 olmo3 opt recurrent_gemma".split()  # noqa: SIM905
HEADS = "aria_text granitemoe minimax mixtral xmod".split()  # noqa: SIM905
NEITHER = "flex_olmo mamba".split()  # noqa: SIM905


def model_of(model_type, task="causal_lm"):
    """A tiny model that has no entry, whatever the table knows of its family."""
    config = copy.deepcopy(tiny_families.small_config(model_type, task))
    if not hasattr(type(config), "head_dim"):
        vars(config).pop("head_dim", None)  # which rotary positions would read nevertheless
    for_task(config, task)
    return tiny_families.build(config, task)


def logits(model):
    tokens = 5 + torch.arange(12)[None] * 11 % 450
    with torch.no_grad():
        return model(input_ids=tokens, **no_cache(model)).logits


def same(one, other):
    return one.shape == other.shape and (one - other).abs().max() <= 2e-5 * other.abs().max()


def halves(whole):
    return View(*(tuple(-(-count // 2) for count in counts) for counts in whole[:2]))


def backwards(whole):
    return UnitOrder(*(tuple(tuple(reversed(range(n))) for n in counts) for counts in whole[:2]))


def without_units(model, cut):
    """The logits of a model in which the units that a cut leaves out give nothing."""
    architecture, before = architecture_of(model.config), {}
    table = weight_axes(model)
    found = architecture.found_units(model.config)
    for _, owner, units in (*found.parts_with("heads"), *found.parts_with("neurons")):
        weight = model.get_submodule(f"{owner}.{units.output}").weight
        axes = table[f"{owner}.{units.output}.weight"]
        (dimension,) = [n for n, axis in enumerate(axes) if axis not in (None, WIDTH)]
        rows = axes[dimension].rows(cut, weight.shape[dimension])
        gone = sorted({*range(weight.shape[dimension])} - {*rows})
        before[weight] = weight.data
        weight.data = weight.data.index_fill(dimension, torch.tensor(gone, dtype=torch.long), 0)
    result = logits(model)
    for weight, value in before.items():
        weight.data = value
    return result


def check_cut(model, task, folder, view=None):
    """Cut half of all units, in memory and to a folder; both compute the model without them."""
    whole = architecture_of(model.config).units(model.config)
    cut = Cut(backwards(whole), view or halves(whole))
    expected = without_units(model, cut)
    assert not same(expected, logits(model)), "the units have no effect"
    write_model_folder(folder, content_of(model, None, cut=cut))
    opened = AUTO_CLASSES[task].from_pretrained(
        folder, attn_implementation="eager", trust_remote_code=brings_code(folder)
    )
    opened.eval()
    assert same(logits(opened), expected)
    elastic = Elastic(model)
    prefix = Cut(None, cut.view)
    for kept in (cut, prefix):
        elastic.keep(kept)
        viewed = logits(model)
        elastic.keep(None)
        assert same(viewed, without_units(model, kept))
    elastic.keep(None)


@pytest.mark.parametrize("model_type", [*BOTH, *NEURONS, *HEADS])
def test_a_cut_model_computes_the_model_without_the_other_units(model_type, tmp_path):
    model = model_of(model_type)
    heads, neurons = architecture_of(model.config).units(model.config)[:2]
    assert (any(heads), any(neurons)) == (model_type not in NEURONS, model_type not in HEADS)
    check_cut(model, "causal_lm", tmp_path / "cut")


@pytest.mark.parametrize("model_type", NEITHER)
def test_what_cannot_be_cut_is_refused_with_the_reason(model_type):
    model = model_of(model_type)
    with pytest.raises(ModelError, match=f"a {model_type} model cannot be cut in width, heads or"):
        architecture_of(model.config).units(model.config)
    axes = {axis for of in weight_axes(model).values() for axis in of if axis is not None}
    assert {axis.kind for axis in axes} <= {"experts"}


@pytest.mark.parametrize(
    ("model_type", "fewest"), [("smollm3", 0), ("gpt_neox", 8), ("opt", 8), ("bloom", 8)]
)
def test_layers_of_different_sizes_bring_the_file_of_their_class(model_type, fewest, tmp_path):
    model = model_of(model_type)
    heads, neurons = architecture_of(model.config).units(model.config)[:2]
    view = View(
        tuple(min(n, 1 + layer) for layer, n in enumerate(heads)), (fewest, neurons[1] // 2)
    )
    check_cut(model, "causal_lm", tmp_path / "cut", view)

    bare = AutoModel.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    opened = load_finished(tmp_path / "cut", "model")
    tokens = torch.arange(5, 17)[None]
    for one in (bare, opened):
        one.set_attn_implementation("eager")
    states = opened.base_model(tokens, use_cache=False).last_hidden_state
    assert torch.equal(bare(tokens, use_cache=False).last_hidden_state, states)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoConfig.from_pretrained(tmp_path / "cut", trust_remote_code=False)
    assert architecture_of(opened.config).units(opened.config)[:2] == view[:2]
    again = View(view.heads, (fewest, 8))
    check_cut(opened, "causal_lm", tmp_path / "again", again)


def test_a_layer_without_heads_has_no_class():
    model = model_of("phi3")
    whole = architecture_of(model.config).units(model.config)
    with pytest.raises(ModelError, match=r"cannot keep \(0, 2\) heads in its layers: the layers"):
        cut_config(model.config, whole._replace(heads=(0, 2)))


NARROWER = [
    *((name, "causal_lm", 40) for name in ("smollm3", "gpt_neox", "olmo2", "phi3", "opt", "bloom")),
    *((name, "mlm", 40) for name in ("modernbert", "mpnet", "deberta-v2", "xlm-roberta")),
    # Rotary positions of a narrower model are those of the heads, which do not divide 42 evenly.
    *((name, "causal_lm", 42) for name in ("smollm3", "stablelm", "falcon", "persimmon")),
]


@pytest.mark.parametrize(("model_type", "task", "columns"), NARROWER)
def test_a_narrower_model_computes_what_the_model_does_as_its_view(
    model_type, task, columns, tmp_path
):
    model = model_of(model_type, task)
    whole = architecture_of(model.config).units(model.config)
    width = tuple(n * 5 % whole.width for n in range(whole.width))
    view = View(*halves(whole)[:2], width=columns)
    moved = {
        name: cut_part(tensor, weight_axes(model).get(name, ()), Cut(order, None))
        for order in [UnitOrder(*backwards(whole)[:2], width=width)]
        for name, tensor in model.state_dict().items()
    }
    reordered = tiny_families.build(model.config, task)
    reordered.load_state_dict(moved)
    assert same(logits(reordered), logits(model)), "the order of columns and units is free"

    assert why_rigid(model.config, architecture_of(model.config)) is None
    cut = Cut(UnitOrder(*backwards(whole)[:2], width=width), view)
    write_model_folder(tmp_path / "cut", content_of(model, None, cut=cut))
    opened = AUTO_CLASSES[task].from_pretrained(
        tmp_path / "cut",
        attn_implementation="eager",
        trust_remote_code=brings_code(tmp_path / "cut"),
    )
    Elastic(model).keep(cut)
    assert same(logits(opened.eval()), logits(model))
    assert opened.config.hidden_size == columns


def test_a_model_whose_hidden_states_stay_is_refused_with_the_reason():
    config = model_of("convbert", "mlm").config
    architecture = architecture_of(config)
    assert "does not compute what is left" in why_rigid(config, architecture)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model_type"),
    [(task, name) for task, names in tiny_families.TYPES.items() for name in sorted(names)],
)
def test_no_family_differs_silently(task, model_type, tmp_path):
    config = tiny_families.small_config(model_type, task, 4)  # hybrids have an attention by then
    config = config or tiny_families.small_config(model_type, task)
    if config is None:
        pytest.skip("no small config")
    try:
        for_task(config, task)
        architecture = find_architecture(config, task)
    except (ModelError, NotImplementedError) as error:
        pytest.skip(f"not read: {error}")
    units = find_units(config, architecture, task)
    if None not in (units.heads.why_fixed, units.neurons.why_fixed):
        pytest.skip(f"heads: {units.heads.why_fixed}; neurons: {units.neurons.why_fixed}")
    check_cut(tiny_families.build(config, task), task, tmp_path / "cut")
