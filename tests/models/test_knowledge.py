"""Outputs that are read from a model equal the outputs of the model itself."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForMaskedLM

from megakd.contract.batch import Batch
from megakd.contract.views import View
from megakd.models.architectures import architecture_of
from megakd.models.elastic import Elastic
from megakd.models.knowledge import Needs, read_knowledge

STATES = Needs(hidden_layers=(0, 1, 2))
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 3, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def model_of(tiny, family, **changes):
    return tiny.load(tiny.save(family, **changes), tiny.task_for(family))


def batch(labels, **inputs) -> Batch:
    return Batch({"input_ids": IDS, "attention_mask": MASK, **inputs}, labels, MASK.bool())


def model_and_batch(tiny, family):
    return model_of(tiny, family), batch(IDS if family == "llama" else torch.tensor([0, 1]))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "t5_encoder", "enct5"])
def test_a_classifier_is_read_as_its_logits_and_its_hidden_states(tiny, family):
    model = model_of(tiny, family)
    theirs = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)

    read = read_knowledge(model, batch(torch.tensor([0, 1])), STATES)

    torch.testing.assert_close(read.logits, theirs.logits)
    torch.testing.assert_close(read.hidden_states, tuple(theirs.hidden_states))
    assert len(read.hidden_states) == 3  # 0 is the embedding output
    assert (read.hidden, read.head) == (None, None)


FAMILIES = ("bert", "roberta", "distilbert", "t5_encoder", "enct5", "llama")


@pytest.mark.parametrize("layers", [(1,), (0, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_states_of_the_layers_asked_for_are_read(tiny, family, layers):
    model, given = model_and_batch(tiny, family)
    everything = read_knowledge(model, given, STATES)

    read = read_knowledge(model, given, Needs(hidden_layers=layers))

    for layer in range(3):
        if layer in layers:
            assert torch.equal(read.states(layer), everything.states(layer))
        else:
            with pytest.raises(TypeError, match=f"states of layer {layer} were not read"):
                read.states(layer)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_states_of_other_layers_are_free_when_the_next_layers_run(tiny, family):
    model, given = model_and_batch(tiny, family)
    made = []
    for layer in (1, 2):
        block = architecture_of(model.config).block_of(model, layer)
        block.register_forward_hook(
            lambda _, __, output: made.append(
                weakref.ref(output if isinstance(output, torch.Tensor) else output[0])
            )
        )

    with torch.no_grad():
        read = read_knowledge(model, given, Needs(hidden_layers=(0,)))

    assert [state() for state in made] == [None, None]
    assert read.states(0) is not None


@pytest.mark.parametrize(
    ("family", "reads_them"),
    [("bert", True), ("roberta", False), ("distilbert", False), ("enct5", False)],
)
def test_the_second_texts_type_reaches_only_models_that_know_one(tiny, family, reads_them):
    types = {"type_vocab_size": 1} if family == "roberta" else {}
    model, labels = model_of(tiny, family, **types), torch.tensor([0, 1])
    plain = read_knowledge(model, batch(labels), Needs())
    typed = read_knowledge(model, batch(labels, token_type_ids=MASK), Needs())
    assert torch.equal(plain.logits, typed.logits) != reads_them


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_causal_lm_is_read_as_hidden_states_and_a_head_that_stand_for_its_logits(
    tiny, tied, monkeypatch
):
    model = model_of(tiny, "llama", tie_word_embeddings=tied)
    theirs = model(input_ids=IDS, attention_mask=MASK).logits
    monkeypatch.setattr(model.lm_head, "forward", None)  # the logits are never formed

    read = read_knowledge(model, batch(IDS), STATES)

    assert (read.logits, read.attention) == (None, ())
    assert read.hidden is not None
    assert read.head is not None
    with read.head.open():
        weight, bias = read.head.read()
    assert weight is (model.model.embed_tokens if tied else model.lm_head).weight
    torch.testing.assert_close(read.hidden @ weight.T, theirs)
    assert bias is None
    assert len(read.hidden_states) == 3
    assert read_knowledge(model, batch(IDS), Needs()).hidden_states == ()


@pytest.mark.parametrize("kind", ["tied", "untied", "masked"])
def test_the_head_is_as_narrow_as_the_view_and_teaches_the_whole_weight(tiny, kind):
    if kind == "masked":
        model = tiny.load(tiny.save("bert", auto=AutoModelForMaskedLM), tiny.task("mlm"))
    else:
        model = model_of(tiny, "llama", tie_word_embeddings=kind == "tied")
    head = model.get_output_embeddings()

    with Elastic(model).viewing(View((1, 1), (3, 8), width=6)):
        theirs = model(input_ids=IDS, attention_mask=MASK).logits
        read = read_knowledge(model, batch(IDS), Needs())
        assert read.head is not None
        weight, bias = read.head.read()
        torch.testing.assert_close(nn.functional.linear(read.hidden, weight, bias), theirs)
    weight.sum().backward()

    assert head.weight.grad.tolist() == [[1.0] * 6 + [0.0] * 10] * 300
    assert read.head.read()[0] is head.weight


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_attention_is_read_of_the_layers_that_are_needed_beside_all_else(tiny, family):
    model, given = model_and_batch(tiny, family)
    plain = read_knowledge(model, given, STATES)

    read = read_knowledge(model, given, STATES._replace(attention_layers=(2,)))

    assert [layer is None for layer in read.attention] == [True, True, False]
    torch.testing.assert_close(read.hidden_states, plain.hidden_states)
    torch.testing.assert_close((read.logits, read.hidden), (plain.logits, plain.hidden))
    vectors = read.attention[2]
    assert vectors is not None
    keys = 16 if family == "bert" else 8  # one head of keys for two of queries
    assert [part.shape[-1] for part in vectors[:3]] == [16, keys, keys]
    assert vectors.width == 8
