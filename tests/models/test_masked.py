"""Masked language models: hidden states and head stand for the logits transformers gives."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_cuts import written
from transformers import AutoModel, AutoModelForMaskedLM

from megakd.contract.batch import IGNORE, Batch
from megakd.engine.sharding import gathered_state
from megakd.models.knowledge import Needs, language_model_head, predict, read_knowledge

FAMILIES = ["bert", "roberta", "distilbert", "electra"]
TIES = pytest.mark.parametrize(
    ("model_type", "tied"), [*((name, True) for name in FAMILIES), ("bert", False)]
)
LABELS = torch.full((2, 12), IGNORE)
LABELS[0, 3], LABELS[0, 9], LABELS[1, 5] = 17, 200, 8


def saved(tiny, model_type, **changes):
    return tiny.save(model_type, auto=AutoModelForMaskedLM, **changes)


def batch(tiny, *, targets: bool) -> Batch:
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 8:] = False
    inputs = {"input_ids": tiny.input_ids, "attention_mask": valid.long()}
    asked = (LABELS != IGNORE).flatten().nonzero()[:, 0] if targets else None
    return Batch(inputs, LABELS, valid, asked)


def embedding_of(model):
    return model.get_input_embeddings().weight


@TIES
def test_a_masked_lm_is_that_of_transformers_and_its_head_stands_for_its_logits(
    tiny, tmp_path, model_type, tied
):
    folder = saved(tiny, model_type, tie_word_embeddings=tied)
    model = tiny.load(folder, tiny.task("mlm"))
    given = batch(tiny, targets=False)
    theirs = model(**given.inputs, output_hidden_states=True)

    read = read_knowledge(model, given, Needs(hidden_layers=(0, 1, 2)))

    assert read.logits is None
    with read.head.open():
        weight, bias = read.head.read()
    assert (weight is embedding_of(model)) == tied
    assert bias.abs().max() > 0.1
    torch.testing.assert_close(read.hidden @ weight.T + bias, theirs.logits)
    torch.testing.assert_close(read.hidden_states, tuple(theirs.hidden_states))
    exported = written(model, tmp_path / "final", state=gathered_state(model), tokenizer=None)
    for one in (folder, exported):
        reference = AutoModelForMaskedLM.from_pretrained(one)
        assert torch.equal(reference(tiny.input_ids).logits, model(tiny.input_ids).logits)
        assert (reference.get_output_embeddings().weight is embedding_of(reference)) == tied
        assert reference.config.architectures == [type(model).__name__]


# ELECTRA's generator has a head narrower than its layers.
def test_a_head_may_be_narrower_than_the_layers(tiny):
    model = tiny.load(saved(tiny, "electra", embedding_size=6), tiny.task("mlm"))
    read = read_knowledge(model, batch(tiny, targets=True), Needs(hidden_layers=(0, 1, 2)))
    assert read.hidden.shape == (3, 6)
    assert read.hidden_states[0].shape == (2, 12, 16)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_head_is_asked_at_the_targets_alone(tiny, model_type, monkeypatch):
    model = tiny.load(saved(tiny, model_type), tiny.task("mlm"))
    everywhere = read_knowledge(model, batch(tiny, targets=False), Needs()).hidden
    head = language_model_head(model)
    monkeypatch.setattr(head._module, "forward", None)

    read = read_knowledge(model, batch(tiny, targets=True), Needs())

    assert len(read.hidden) == 3
    torch.testing.assert_close(read.hidden, everywhere[LABELS != IGNORE])


@pytest.mark.parametrize("targets", [True, False])
def test_its_predictions_are_the_sums_its_metrics_need(tiny, targets):
    model = tiny.load(saved(tiny, "bert"), tiny.task("mlm"))
    given = batch(tiny, targets=targets)

    with torch.no_grad():
        actual = predict(model, given)
        logits = model(**given.inputs).logits.double()[LABELS != IGNORE]

    truth = LABELS[LABELS != IGNORE]
    nats = torch.nn.functional.cross_entropy(logits, truth, reduction="sum")
    right = (logits.argmax(-1) == truth).sum()
    assert actual.sums.tolist() == pytest.approx([nats.item(), right.item(), 3.0])


def test_a_bare_backbone_gets_a_new_head_whose_matrix_is_its_embedding(tiny):
    folder = tiny.save("bert", auto=AutoModel)

    model = tiny.load(folder, tiny.task("mlm"), need_head=False)

    stored = load_file(folder / "model.safetensors")["embeddings.word_embeddings.weight"]
    weight, bias = language_model_head(model).read()
    assert weight is embedding_of(model)
    assert torch.equal(weight, stored)
    assert not bias.any()
