"""Attention by document against masked attention, and the choice of an attention."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE
from megakd.data.collation import Collator
from megakd.data.step_layout import packed_row
from megakd.data.token_tables import pack
from megakd.errors import ModelError
from megakd.models.knowledge import Needs, read_knowledge
from megakd.models.packed_attention import VARLEN, attend
from megakd.models.packing import set_attention
from megakd.models.structure import architecture_of

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "gemma2": {"attn_logit_softcapping": None},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "granite": {},
    "qwen3_moe": {},
}
# Attentions that neither sdpa nor varlen compute.
EAGER = ("gemma2", "gpt_oss")
# Lengths of documents, in rows of 12 tokens; the last row is shorter.
DOCUMENTS = (5, 2, 9, 1, 14, 3)
LENGTH = 12


def collator(length=LENGTH):
    task = TaskConfig(type="causal_lm", dataset="d", max_length=length)
    return Collator(SimpleNamespace(pad_token_id=0), task)


def packed():
    """A batch of packed documents, with a dummy row."""
    rng = np.random.default_rng(0)
    rows = pack((rng.integers(2, 300, size=n) for n in DOCUMENTS), LENGTH)
    return collator()([row._asdict() for row in rows], dummy_rows=1)


def model_of(tiny, family, dtype=torch.float32, **keys):
    folder = tiny.save(family, **{**FAMILIES.get(family, {}), **keys})
    return tiny.load(folder, tiny.task("causal_lm")).to(dtype).eval()


def attend_with(model, name, device="cpu"):
    source = SimpleNamespace(attn_implementation=name, where="student.model")
    set_attention(model, source, "causal_lm", torch.device(device))


def masked_attention(family):
    return "eager" if family in EAGER else "sdpa"


def hidden_and_gradient(model, batch, name):
    model.set_attn_implementation(name)
    model.zero_grad()
    hidden = read_knowledge(model, batch, Needs()).hidden
    (hidden.float() * batch.valid[..., None]).square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach()[batch.valid], gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_one_by_one_equal_masked_rows(tiny, family):
    model, batch = model_of(tiny, family), packed()
    attend_with(model, VARLEN)

    ours, our_gradients = hidden_and_gradient(model, batch, VARLEN)
    theirs, their_gradients = hidden_and_gradient(model, batch, masked_attention(family))

    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        scale = their_gradients[name].abs().max()
        torch.testing.assert_close(
            gradient / scale, their_gradients[name] / scale, rtol=0, atol=3e-5
        )


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma3_text"])
def test_documents_in_bf16_equal_masked_rows_up_to_rounding(tiny, family):
    model, batch = model_of(tiny, family, torch.bfloat16), packed()
    attend_with(model, VARLEN)
    ours, _ = hidden_and_gradient(model, batch, VARLEN)
    theirs, _ = hidden_and_gradient(model, batch, masked_attention(family))
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=5e-2, atol=5e-2)


def test_no_mask_is_built(tiny, monkeypatch):
    model, batch = model_of(tiny, "llama"), packed()
    attend_with(model, VARLEN)
    masks = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda _, __, named: masks.append(named.get("attention_mask")), with_kwargs=True
    )

    read_knowledge(model, batch, Needs())

    assert masks == [None]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), length=st.integers(2, 12))
def test_the_collator_states_where_documents_begin(lengths, length):
    rows = list(pack((np.arange(n) + 2 for n in lengths), length))
    batch = collator(length)([row._asdict() for row in rows])
    starts, longest = batch.documents

    positions = batch.inputs["position_ids"].flatten()
    assert starts.dtype == torch.int32
    assert starts[0] == 0
    assert starts[-1] == positions.numel()
    parts = [positions[a:b] for a, b in pairwise(starts.tolist())]
    assert all(torch.equal(part, torch.arange(len(part))) for part in parts)
    assert longest == max(map(len, parts))
    width = batch.valid.shape[1]
    assert all(a // width == (b - 1) // width for a, b in pairwise(starts.tolist()))


def test_without_boundaries_every_row_is_a_document():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)

    actual, _ = attend(None, query, key, value, None, scaling=0.3)

    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("dtype", "keys", "device", "chosen"),
    [
        (torch.bfloat16, {}, "cuda", VARLEN),
        (torch.float32, {}, "cuda", "sdpa"),
        (torch.bfloat16, {"attention_dropout": 0.1}, "cuda", "sdpa"),
        (torch.bfloat16, {"head_dim": 12}, "cuda", "sdpa"),
        (torch.bfloat16, {}, "cpu", "sdpa"),
    ],
    ids=["gpu", "fp32", "dropout", "width", "cpu"],
)
def test_packed_rows_use_it_on_a_gpu_whose_kernel_supports_the_model(
    tiny, dtype, keys, device, chosen
):
    model = model_of(tiny, "llama", dtype, **keys)
    attend_with(model, None, device)
    assert model.config._attn_implementation == chosen


def test_it_is_refused_where_the_kernel_of_the_gpu_does_not_support_the_model(tiny):
    with pytest.raises(ModelError, match=r"^student.attn_implementation: varlen needs bf16"):
        attend_with(model_of(tiny, "llama"), VARLEN, "cuda")


def test_a_saved_model_opens_with_the_attention_of_transformers(tiny, tmp_path):
    model = model_of(tiny, "llama")
    attend_with(model, VARLEN)
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", [*FAMILIES, *EAGER])
def test_packed_documents_are_read_as_they_would_be_alone(tiny, family):
    model, batch = model_of(tiny, family), packed()
    if family not in EAGER:
        attend_with(model, "sdpa")

    together = read_knowledge(model, batch, Needs()).hidden.flatten(0, 1)

    ids, valid = batch.inputs["input_ids"].flatten(), batch.valid.flatten()
    backbone = architecture_of(model.config).backbone_of(model)
    for first, end in pairwise(batch.documents.starts.tolist()):
        if valid[first]:
            alone = backbone(ids[None, first:end], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(together[first:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", VARLEN])
@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", r"gemma2 model has a cap on attention scores \(attn_logit_softcapping: 0.5\)"),
        ("gpt_oss", "gpt_oss model has attention sinks"),
    ],
)
def test_an_attention_that_leaves_out_a_part_of_the_model_is_refused(tiny, family, message, name):
    model = tiny.load(tiny.save(family), tiny.task("causal_lm"))
    with pytest.raises(ModelError, match=f"{message}, which {name} does not support; use eager"):
        attend_with(model, name)


@pytest.mark.parametrize("family", EAGER)
def test_a_gpu_computes_what_only_eager_attention_can_with_eager_attention(tiny, family):
    model = tiny.load(tiny.save(family), tiny.task("causal_lm")).to(torch.bfloat16)
    attend_with(model, None, "cuda")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "phi", "gpt_oss"])
def test_texts_of_a_row_longer_than_the_models_positions_are_read_as_alone(tiny, family):
    """A token budget packs such rows."""
    positions = "n_positions" if family == "gpt2" else "max_position_embeddings"
    folder = tiny.save(family, **{positions: 32})
    model, collate = tiny.load(folder, tiny.task("causal_lm", max_length=32)), collator(32)
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 300, size=length).tolist() for length in (30, 7, 24, 1, 11, 32)]
    rows = [{"input_ids": ids, "labels": [*ids[1:], IGNORE]} for ids in texts]

    def hidden(batch):
        with torch.no_grad():
            return read_knowledge(model, batch, Needs()).hidden[batch.valid]

    together = packed_row(collate(rows), most=128)

    assert together.valid.shape == (1, 112)
    alone = torch.cat([hidden(collate([row])) for row in rows])
    torch.testing.assert_close(hidden(together), alone, rtol=1e-4, atol=1e-4)
