"""The vectors that are noted are those that the model's attention computes with."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megakd.models.architectures import ARCHITECTURES, architecture_of
from megakd.models.attention import AttentionNotes

PACKED = torch.tensor([[*range(12)], [0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1, 2]])


def noted(model, layers, **inputs):
    notes = AttentionNotes(model, layers)
    with notes.taking():
        out = architecture_of(model.config).backbone_of(model)(**inputs)
    return notes.vectors(), out.last_hidden_state


def inputs_of(model, ids):
    """Decoders as the trainer feeds them: packed documents and no cache."""
    if architecture_of(model.config).rotary is None:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"input_ids": ids, "position_ids": PACKED, "use_cache": False}


@pytest.fixture
def computed(monkeypatch):
    """[B, heads, T, width] queries, keys and values of every layer that was computed."""
    seen, real = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, *rest, **options):
        seen.append((query, key, value))
        return real(module, query, key, value, *rest, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    return seen


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_noted_vectors_are_what_the_attention_of_a_layer_gets(tiny, computed, model_type):
    model = tiny.load(tiny.save(model_type), tiny.task_for(model_type))

    vectors, _ = noted(model, (1, 2), **inputs_of(model, tiny.input_ids))

    assert vectors[0] is None
    for ours, theirs in zip(vectors[1:], computed, strict=True):
        for name, wanted in zip(("queries", "keys", "values"), theirs, strict=True):
            found = getattr(ours, name).unflatten(-1, (-1, ours.width)).transpose(1, 2)
            torch.testing.assert_close(found, wanted, msg=name)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "llama", "qwen2"])
def test_gradient_checkpointing_changes_neither_the_vectors_nor_their_gradients(tiny, model_type):
    dropout = {"attention_dropout": 0.0}
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout")
    dropout |= {name: 0.0 for name in names if model_type in ("bert", "roberta", "distilbert")}
    folder = tiny.save(model_type, **dropout)
    results = []
    for checkpointed in (False, True):
        model = tiny.load(folder, tiny.task_for(model_type)).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        vectors, out = noted(model, (1, 2), **inputs_of(model, tiny.input_ids))
        flat = torch.cat([part.flatten() for layer in vectors[1:] for part in layer[:3]])
        (flat.square().sum() + out.sum()).backward()
        results.append((flat.detach(), {n: p.grad for n, p in model.named_parameters()}))

    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_on_the_model_when_its_forward_is_over(tiny, fails):
    model = tiny.load(tiny.scratch("llama"), tiny.task_for("llama"), need_head=False)

    try:
        noted(model, (2,), input_ids=tiny.input_ids.float() if fails else tiny.input_ids)
    except RuntimeError:
        assert fails

    assert not any(module._forward_hooks for module in model.modules())


def test_only_the_layers_that_are_wanted_are_noted(tiny):
    model = tiny.load(tiny.scratch("bert"), tiny.task(), need_head=False)

    vectors, _ = noted(model, (2,), input_ids=tiny.input_ids)

    assert [layer is None for layer in vectors] == [True, True, False]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_map_knows_how_vectors_are_cut_into_heads(tiny, model_type):
    model = tiny.load(tiny.scratch(model_type), tiny.task_for(model_type), need_head=False)
    architecture = architecture_of(model.config)

    queries, keys, values = architecture.projections_of(model, 1)

    heads = architecture.heads(model.config)
    assert queries.out_features == heads.queries * heads.width
    assert keys.out_features == values.out_features == heads.keys * heads.width
