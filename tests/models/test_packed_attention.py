"""Attention by document against masked attention, and the choice of an attention."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megakd.data.collation import Collator
from megakd.data.token_tables import pack
from megakd.errors import ModelError
from megakd.models.architectures import architecture_of
from megakd.models.knowledge import Needs, read_knowledge
from megakd.models.packed_attention import VARLEN, attend, set_attention

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


def packed(tiny, lengths=DOCUMENTS, length=LENGTH):
    """A batch of packed documents, with a dummy row."""
    rng = np.random.default_rng(0)
    rows = pack((rng.integers(2, 300, size=n) for n in lengths), length)
    task = dataclasses.replace(tiny.task("causal_lm"), max_length=length)
    collate = Collator(SimpleNamespace(pad_token_id=0), task)
    return collate([row._asdict() for row in rows], dummy_rows=1)


def model_of(tiny, family, dtype=torch.float32, **keys):
    keys = {**FAMILIES[family], **keys}
    folder = tiny.save(family, **keys)
    return tiny.load(folder, tiny.task("causal_lm")).to(dtype).eval()


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
    model, batch = model_of(tiny, family), packed(tiny)
    set_attention(model, source_with(VARLEN), "causal_lm", torch.device("cpu"))

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
    model, batch = model_of(tiny, family, torch.bfloat16), packed(tiny)
    set_attention(model, source_with(VARLEN), "causal_lm", torch.device("cpu"))
    ours, _ = hidden_and_gradient(model, batch, VARLEN)
    theirs, _ = hidden_and_gradient(model, batch, masked_attention(family))
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=5e-2, atol=5e-2)


def test_no_mask_is_built(tiny, monkeypatch):
    model, batch = model_of(tiny, "llama"), packed(tiny)
    set_attention(model, source_with(VARLEN), "causal_lm", torch.device("cpu"))
    masks = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda _, __, named: masks.append(named.get("attention_mask")), with_kwargs=True
    )

    read_knowledge(model, batch, Needs())

    assert masks == [None]


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), length=st.integers(2, 12))
def test_the_collator_states_where_documents_begin(tiny_task, lengths, length):
    rows = list(pack((np.arange(n) + 2 for n in lengths), length))
    task = dataclasses.replace(tiny_task, max_length=length)
    batch = Collator(SimpleNamespace(pad_token_id=0), task)([row._asdict() for row in rows])
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


@pytest.fixture(scope="module")
def tiny_task():
    from megakd.config.task import TaskConfig

    return TaskConfig(type="causal_lm", dataset="d", max_length=LENGTH)


def test_without_boundaries_every_row_is_a_document():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)

    actual, _ = attend(None, query, key, value, None, scaling=0.3)

    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected.transpose(1, 2))


def source_with(name):
    return SimpleNamespace(attn_implementation=name, where="student.model")


@pytest.mark.parametrize(
    ("dtype", "keys", "task", "device", "chosen"),
    [
        (torch.bfloat16, {}, "causal_lm", "cuda", VARLEN),
        (torch.float32, {}, "causal_lm", "cuda", "sdpa"),
        (torch.bfloat16, {"attention_dropout": 0.1}, "causal_lm", "cuda", "sdpa"),
        (torch.bfloat16, {"head_dim": 12}, "causal_lm", "cuda", "sdpa"),
        (torch.bfloat16, {}, "causal_lm", "cpu", "sdpa"),
    ],
    ids=["gpu", "fp32", "dropout", "width", "cpu"],
)
def test_packed_rows_use_it_on_a_gpu_whose_kernel_supports_the_model(
    tiny, dtype, keys, task, device, chosen
):
    model = model_of(tiny, "llama", dtype, **keys)
    set_attention(model, source_with(None), task, torch.device(device))
    assert model.config._attn_implementation == chosen


def test_it_is_refused_where_the_kernel_of_the_gpu_does_not_support_the_model(tiny):
    with pytest.raises(ModelError, match=r"^student.attn_implementation: varlen needs bf16"):
        set_attention(
            model_of(tiny, "llama"), source_with(VARLEN), "causal_lm", torch.device("cuda")
        )


def test_a_saved_model_opens_with_the_attention_of_transformers(tiny, tmp_path):
    model = model_of(tiny, "llama")
    set_attention(model, source_with(VARLEN), "causal_lm", torch.device("cpu"))
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", [*FAMILIES, *EAGER])
def test_packed_documents_are_read_as_they_would_be_alone(tiny, family):
    keys = {} if family in EAGER else FAMILIES[family]
    model = tiny.load(tiny.save(family, **keys), tiny.task("causal_lm"))
    batch = packed(tiny)
    if family not in EAGER:
        set_attention(model, source_with("sdpa"), "causal_lm", torch.device("cpu"))

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
        set_attention(model, source_with(name), "causal_lm", torch.device("cpu"))


@pytest.mark.parametrize("family", EAGER)
def test_a_gpu_computes_what_only_eager_attention_can_with_eager_attention(tiny, family):
    model = tiny.load(tiny.save(family), tiny.task("causal_lm")).to(torch.bfloat16)
    model.eval()
    set_attention(model, source_with(None), "causal_lm", torch.device("cuda"))
    assert model.config._attn_implementation == "eager"
