"""Outputs and vectors that are read from a model equal those that the model computes with."""

from __future__ import annotations

import weakref

import pytest
import tiny_families
import torch
from cut_families import FAMILIES
from safetensors.torch import load_file
from tiny_cuts import build, cut, task_of, view_of, written
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megakd.data.batch import IGNORE, Batch
from megakd.engine.sharding import gathered_state
from megakd.errors import ModelError
from megakd.models.elastic import Elastic
from megakd.models.outputs import LanguageModelHead, Needs, attentions_taken, read_outputs
from megakd.models.packing import VARLEN, register_packed_attention
from megakd.models.structure import architecture_of
from megakd.models.views import View

STATES = Needs(hidden_layers=(0, 1, 2))
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 3, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def model_of(tiny, family, **changes):
    return tiny.load(tiny.save(family, **changes), tiny.task_for(family))


def batch(labels, **inputs) -> Batch:
    return Batch({"input_ids": IDS, "attention_mask": MASK, **inputs}, labels, MASK.bool())


def model_and_batch(tiny, family):
    return model_of(tiny, family), batch(IDS if family == "llama" else torch.tensor([0, 1]))


@pytest.mark.parametrize("family", ["bert", "t5_encoder", "enct5"])
def test_a_classifier_is_read_as_its_logits_and_its_hidden_states(tiny, family):
    model = model_of(tiny, family)
    theirs = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)

    read = read_outputs(model, batch(torch.tensor([0, 1])), STATES)

    torch.testing.assert_close(read.logits, theirs.logits)
    torch.testing.assert_close(read.hidden_states, tuple(theirs.hidden_states))
    assert len(read.hidden_states) == 3  # 0 is the embedding output
    assert (read.hidden, read.head) == (None, None)


@pytest.mark.parametrize(
    ("family", "layers"), [("bert", (0, 2)), ("enct5", (0,)), ("llama", (0, 2))]
)
def test_only_the_states_of_the_layers_asked_for_are_read(tiny, family, layers):
    model, given = model_and_batch(tiny, family)
    everything = read_outputs(model, given, STATES)
    passing = []
    architecture_of(model.config).block_of(model, 1).register_forward_hook(
        lambda _, __, output: passing.append(
            weakref.ref(output if isinstance(output, torch.Tensor) else output[0])
        )
    )

    with torch.no_grad():
        read = read_outputs(model, given, Needs(hidden_layers=layers))

    assert [state() for state in passing] == [None]  # no memory for what nobody asked for
    for layer in layers:
        assert torch.equal(read.states(layer), everything.states(layer))
    with pytest.raises(TypeError, match="states of layer 1 were not read"):
        read.states(1)


@pytest.mark.parametrize(
    ("family", "reads_them"),
    [("bert", True), ("roberta", False), ("distilbert", False), ("enct5", False)],
)
def test_the_second_texts_type_reaches_only_models_that_know_one(tiny, family, reads_them):
    types = {"type_vocab_size": 1} if family == "roberta" else {}
    model, labels = model_of(tiny, family, **types), torch.tensor([0, 1])
    plain = read_outputs(model, batch(labels), Needs())
    typed = read_outputs(model, batch(labels, token_type_ids=MASK), Needs())
    assert torch.equal(plain.logits, typed.logits) != reads_them


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_causal_lm_is_read_as_hidden_states_and_a_head_that_stand_for_its_logits(
    tiny, tied, monkeypatch
):
    model = model_of(tiny, "llama", tie_word_embeddings=tied)
    theirs = model(input_ids=IDS, attention_mask=MASK).logits
    monkeypatch.setattr(model.lm_head, "forward", None)  # the logits are never formed

    read = read_outputs(model, batch(IDS), STATES)

    assert (read.logits, read.attention) == (None, ())
    assert read.hidden is not None
    assert read.head is not None
    with read.head.open():
        weight, bias = read.head.read()
    assert weight is (model.model.embed_tokens if tied else model.lm_head).weight
    torch.testing.assert_close(read.hidden @ weight.T, theirs)
    assert bias is None
    assert len(read.hidden_states) == 3
    assert read_outputs(model, batch(IDS), Needs()).hidden_states == ()


@pytest.mark.parametrize("kind", ["tied", "untied", "masked"])
def test_the_head_is_as_narrow_as_the_view_and_teaches_the_whole_weight(tiny, kind):
    if kind == "masked":
        model = tiny.load(tiny.save("bert", auto=AutoModelForMaskedLM), tiny.task("mlm"))
    else:
        model = model_of(tiny, "llama", tie_word_embeddings=kind == "tied")
    head = model.get_output_embeddings()

    with Elastic(model).viewing(View((1, 1), (3, 8), width=6)):
        theirs = model(input_ids=IDS, attention_mask=MASK).logits
        read = read_outputs(model, batch(IDS), Needs())
        assert read.head is not None
        weight, bias = read.head.read()
        torch.testing.assert_close(nn.functional.linear(read.hidden, weight, bias), theirs)
    weight.sum().backward()

    assert head.weight.grad.tolist() == [[1.0] * 6 + [0.0] * 10] * 300
    assert read.head.read()[0] is head.weight


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_attention_is_read_of_the_layers_that_are_needed_beside_all_else(tiny, family):
    model, given = model_and_batch(tiny, family)
    plain = read_outputs(model, given, STATES)

    read = read_outputs(model, given, STATES._replace(attention_layers=(2,)))

    assert [layer is None for layer in read.attention] == [True, True, False]
    torch.testing.assert_close(read.hidden_states, plain.hidden_states)
    torch.testing.assert_close((read.logits, read.hidden), (plain.logits, plain.hidden))
    vectors = read.attention[2]
    assert vectors is not None
    keys = 16 if family == "bert" else 8  # one head of keys for two of queries
    assert [part.shape[-1] for part in vectors[:3]] == [16, keys, keys]
    assert vectors.width == 8


PACKED = torch.tensor([[*range(12)], [0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1, 2]])


def noted(model, layers, **inputs):
    with attentions_taken(model, layers) as vectors:
        out = architecture_of(model.config).backbone_of(model)(**inputs)
    return vectors, out.last_hidden_state


def inputs_of(model, ids):
    """Decoders as the trainer feeds them: packed documents and no cache."""
    if "causal_lm" not in architecture_of(model.config).tasks:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, "position_ids": PACKED, "use_cache": False}


@pytest.fixture
def computed(monkeypatch):
    """[B, heads, T, width] queries, keys and values of every layer that was computed."""
    seen, real = [], ALL_ATTENTION_FUNCTIONS["sdpa"]
    register_packed_attention()

    def spy(module, query, key, value, *rest, **options):
        seen.append((query, key, value))
        options.pop("softcap", None)  # which sdpa lacks; the vectors come before the cap
        return real(module, query, key, value, *rest, **options)

    for name in ("sdpa", VARLEN):
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, spy)
    return seen


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        *((name, {}) for name in (*FAMILIES, "phi3", "gpt_oss", "qwen3_moe")),
        ("phi", {"qk_layernorm": True}),  # norms of single heads
    ],
)
def test_noted_vectors_are_what_the_attention_of_a_layer_gets(tiny, computed, model_type, keys):
    model = tiny.load(tiny.save(model_type, **keys), tiny.task_for(model_type))
    if model.config._attn_implementation == "eager":  # which cannot be watched
        model.set_attn_implementation(VARLEN)

    vectors, _ = noted(model, (1, 2), **inputs_of(model, tiny.input_ids))

    assert [*vectors] == [1, 2]
    for ours, theirs in zip(vectors.values(), computed, strict=True):
        for name, wanted in zip(("queries", "keys", "values"), theirs, strict=True):
            actual = getattr(ours, name).unflatten(-1, (-1, ours.width)).transpose(1, 2)
            torch.testing.assert_close(actual, wanted, msg=name)


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2", "gemma2", "enct5"])
def test_a_layer_without_heads_is_noted_as_zeros(model_type):
    whole = build(model_type)
    model = cut(whole, task_of(model_type), view_of(whole, "empty"))
    heads = architecture_of(model.config).heads(model.config)

    vectors, _ = noted(model, (1, 2), input_ids=torch.arange(2, 26).reshape(2, 12))

    of_none, of_two = vectors[1], vectors[2]
    assert not any(part.any() for part in of_none[:3])
    assert [part.shape[-1] * 2 for part in of_none[:3]] == [part.shape[-1] for part in of_two[:3]]
    assert of_two.keys.shape == (2, 12, 2 * heads.width)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_on_the_model_when_its_forward_is_over(tiny, fails):
    model = tiny.load(tiny.scratch("llama"), tiny.task_for("llama"), need_head=False)

    try:
        noted(model, (2,), input_ids=tiny.input_ids.float() if fails else tiny.input_ids)
    except RuntimeError:
        assert fails

    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", ["bloom", "mamba"])
def test_attentions_outside_of_those_of_transformers_are_refused(model_type):
    model = tiny_families.build(tiny_families.small_config(model_type, "causal_lm"), "causal_lm")
    with pytest.raises(ModelError, match=r"cannot read the attentions of a .* use hidden_mse"):
        noted(model, (1,))


LABELS = torch.full((2, 12), IGNORE)
LABELS[0, 3], LABELS[0, 9], LABELS[1, 5] = 17, 200, 8


def saved_masked(tiny, model_type, **changes):
    return tiny.save(model_type, auto=AutoModelForMaskedLM, **changes)


def masked_batch(tiny, *, targets: bool) -> Batch:
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 8:] = False
    inputs = {"input_ids": tiny.input_ids, "attention_mask": valid.long()}
    asked = (LABELS != IGNORE).flatten().nonzero()[:, 0] if targets else None
    return Batch(inputs, LABELS, valid, asked)


def embedding_of(model):
    return model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("model_type", "tied", "keys"),
    [
        ("bert", True, {}),
        ("bert", False, {}),
        ("electra", True, {"embedding_size": 6}),  # a head narrower than the layers
    ],
)
def test_a_masked_lm_is_that_of_transformers_and_its_head_stands_for_its_logits(
    tiny, tmp_path, model_type, tied, keys
):
    folder = saved_masked(tiny, model_type, tie_word_embeddings=tied, **keys)
    model = tiny.load(folder, tiny.task("mlm"))
    given = masked_batch(tiny, targets=False)
    theirs = model(**given.inputs, output_hidden_states=True)

    read = read_outputs(model, given, Needs(hidden_layers=(0, 1, 2)))

    assert read.logits is None
    with read.head.open():
        weight, bias = read.head.read()
    assert (weight is embedding_of(model)) == tied
    assert bias.abs().max() > 0.1
    assert read.hidden.shape[-1] == keys.get("embedding_size", 16)
    torch.testing.assert_close(read.hidden @ weight.T + bias, theirs.logits)
    torch.testing.assert_close(read.hidden_states, tuple(theirs.hidden_states))
    exported = written(model, tmp_path / "final", state=gathered_state(model), tokenizer=None)
    for one in (folder, exported):
        reference = AutoModelForMaskedLM.from_pretrained(one)
        assert torch.equal(reference(tiny.input_ids).logits, model(tiny.input_ids).logits)
        assert (reference.get_output_embeddings().weight is embedding_of(reference)) == tied
        assert reference.config.architectures == [type(model).__name__]


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_the_head_is_asked_at_the_targets_alone(tiny, model_type, monkeypatch):
    model = tiny.load(saved_masked(tiny, model_type), tiny.task("mlm"))
    everywhere = read_outputs(model, masked_batch(tiny, targets=False), Needs()).hidden
    head = LanguageModelHead(model)
    monkeypatch.setattr(head._module, "forward", None)

    read = read_outputs(model, masked_batch(tiny, targets=True), Needs())

    assert len(read.hidden) == 3
    torch.testing.assert_close(read.hidden, everywhere[LABELS != IGNORE])


def test_a_bare_backbone_gets_a_new_head_whose_matrix_is_its_embedding(tiny):
    folder = tiny.save("bert", auto=AutoModel)

    model = tiny.load(folder, tiny.task("mlm"), need_head=False)

    stored = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    weight, bias = LanguageModelHead(model).read()
    assert weight is embedding_of(model)
    assert torch.equal(weight, stored)
    assert not bias.any()
