"""The noted vectors are the vectors that the model's attention computes with."""

from __future__ import annotations

import pytest
import torch
from tiny_cuts import FAMILIES as TINY_CUTS
from tiny_cuts import build, cut, task_of, view_of
from transformers import CONFIG_MAPPING
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megakd.errors import ModelError
from megakd.models.architectures import FAMILIES, architecture_of
from megakd.models.knowledge import AttentionNotes
from megakd.models.packed_attention import VARLEN, register_packed_attention

PACKED = torch.tensor([[*range(12)], [0, 1, 2, 3, 4, 0, 1, 2, 0, 0, 1, 2]])


def noted(model, layers, **inputs):
    notes = AttentionNotes(model, layers)
    with notes.taking():
        out = architecture_of(model.config).backbone_of(model)(**inputs)
    return notes.vectors(), out.last_hidden_state


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


@pytest.mark.parametrize("model_type", FAMILIES)
def test_noted_vectors_are_what_the_attention_of_a_layer_gets(tiny, computed, model_type):
    model = tiny.load(tiny.save(model_type), tiny.task_for(model_type))
    if model.config._attn_implementation == "eager":  # which cannot be watched
        model.set_attn_implementation(VARLEN)

    vectors, _ = noted(model, (1, 2), **inputs_of(model, tiny.input_ids))

    assert vectors[0] is None
    for ours, theirs in zip(vectors[1:], computed, strict=True):
        for name, wanted in zip(("queries", "keys", "values"), theirs, strict=True):
            actual = getattr(ours, name).unflatten(-1, (-1, ours.width)).transpose(1, 2)
            torch.testing.assert_close(actual, wanted, msg=name)


@pytest.mark.parametrize("model_type", TINY_CUTS)
def test_a_layer_without_heads_is_noted_as_zeros(model_type):
    whole = build(model_type)
    model = cut(whole, task_of(model_type), view_of(whole, "empty"))
    heads = architecture_of(model.config).heads(model.config)

    vectors, _ = noted(model, (1, 2), input_ids=torch.arange(2, 26).reshape(2, 12))

    of_none, of_two = vectors[1], vectors[2]
    assert not any(part.any() for part in of_none[:3])
    assert [part.shape[-1] * 2 for part in of_none[:3]] == [part.shape[-1] for part in of_two[:3]]
    assert of_two.keys.shape == (2, 12, 2 * heads.width)


@pytest.mark.parametrize("model_type", ["bert", "enct5", "llama", "gpt2", "gemma2", "gpt_oss"])
def test_gradient_checkpointing_changes_neither_the_vectors_nor_their_gradients(tiny, model_type):
    names = CONFIG_MAPPING[model_type]().to_dict()
    folder = tiny.save(model_type, **{n: 0.0 for n in names if "drop" in n})
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


def test_norms_that_the_table_does_not_list_are_refused(tiny):
    model = tiny.load(tiny.save("phi", qk_layernorm=True), tiny.task("causal_lm"))
    with pytest.raises(ModelError, match="do not support a model with qk_layernorm: true"):
        AttentionNotes(model, (1,))
