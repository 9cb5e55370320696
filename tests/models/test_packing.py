"""Documents in one row: which models compute them as alone, and the attentions that do."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_families
import torch

from megakd.config.task import TaskConfig
from megakd.data.batch import IGNORE, Batch
from megakd.data.collation import Collator, documents_of
from megakd.data.loader import packed_row
from megakd.data.token_tables import pack, single_documents
from megakd.errors import ModelError
from megakd.models.outputs import Needs, read_outputs
from megakd.models.packing import VARLEN, Packing, attend, packing_of, set_attention
from megakd.models.structure import for_task

TYPES = sorted(tiny_families.TYPES["causal_lm"])
# By what keeps documents apart; those that are "apart" are recurrent, convolve, or do it beside
# attentions. The slow test has all types.
PACKINGS: dict[Packing, str] = {
    "positions": "llama mistral gpt2 gemma2 gemma3_text phi3 granite mixtral smollm3 olmo3",
    "mask": "biogpt",
    "masks_by_type": "gpt_oss",
    "apart": "mamba lfm2 jamba",
}
# How far tokens see, so that it matters in these rows; a small lfm2 has attentions alone, and a row
# of a Mamba costs as much as a chunk.
SHORT = {"sliding_window": 5}
KEYS = {
    "mistral": SHORT,
    "gemma2": SHORT,
    "gemma3_text": SHORT,
    "phi3": SHORT,
    "gpt_oss": SHORT,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
EAGER = ("gemma2", "gpt_oss")
"""Attentions that neither sdpa nor varlen compute."""
DOCUMENTS = (21, 9, 1, 14)
LENGTH = 24


def collator(length: int = LENGTH) -> Collator:
    task = TaskConfig(type="causal_lm", dataset="d", max_length=length)
    return Collator(SimpleNamespace(pad_token_id=0), task)  # type: ignore[arg-type]


def batch_of(*, packed: bool = True) -> Batch:
    """A padded batch of documents in rows, with a dummy row at the end."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(5, 300, size=count) for count in DOCUMENTS]
    rows = (pack if packed else single_documents)(documents, LENGTH)
    return collator()([row._asdict() for row in rows], dummy_rows=1)


def config_of(model_type: str):
    config = tiny_families.small_config(model_type, "causal_lm")
    for key, value in KEYS.get(model_type, {}).items():
        setattr(config, key, value)
    if getattr(config, "mamba_chunk_size", None):
        config.mamba_chunk_size = 8
    return config


def model_of(model_type: str):
    model = tiny_families.build(config_of(model_type), "causal_lm")
    for_task(model.config, "causal_lm")
    if model_type in EAGER:
        model.set_attn_implementation("eager")
    return model


def logits(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        read = read_outputs(model, batch, Needs())
        weight, bias = read.head.read()
        product = read.hidden @ weight.T
        return read.head.warp(product if bias is None else product + bias)


def largest_difference(model, batch: Batch) -> float:
    """Between the logits of the documents in the rows of a batch, and those of each alone."""
    every, scale, apart = logits(model, batch), 0.0, 0.0
    starts = documents_of(batch.inputs["position_ids"].numpy()).starts.tolist()
    ids, valid = batch.inputs["input_ids"].flatten(), batch.valid.flatten()
    for first, stop in pairwise(starts):
        if not valid[first]:
            continue
        with torch.no_grad():
            alone = model(input_ids=ids[None, first:stop], use_cache=False).logits[0]
        apart = max(apart, (every.flatten(0, 1)[first:stop] - alone).abs().max().item())
        scale = max(scale, alone.abs().max().item())
    assert torch.isfinite(every).all()  # of dummy rows too
    return apart / scale


def decided(model_type: str) -> tuple[Packing, float]:
    """How documents are kept apart, and how far logits are from those of documents alone."""
    model = model_of(model_type)
    packing = packing_of(model.config, model.config._attn_implementation)
    return packing, largest_difference(model, batch_of(packed=packing != "apart"))


@pytest.mark.parametrize(
    ("model_type", "packing"),
    [(name, packing) for packing, names in PACKINGS.items() for name in names.split()],
)
def test_documents_share_a_row_only_if_that_changes_no_logits(model_type, packing):
    actual, difference = decided(model_type)

    assert actual == packing
    assert difference < 2e-5


@pytest.mark.slow
def test_all_families_are_packed_only_if_that_changes_no_logits(capsys):
    """Prints the table; a family whose parts cannot be read is refused before."""
    wrong, counts = [], Counter()
    for model_type in (name for name in TYPES if config_of(name) is not None):
        try:
            packing, difference = decided(model_type)
        except ModelError as error:
            packing, difference = str(error), 0.0
        counts["not read" if " " in packing else packing] += 1
        wrong += [model_type] * (difference > 2e-5)
        with capsys.disabled():
            sys.stdout.write(f"{model_type:28} {difference:.0e} {packing}\n")
    with capsys.disabled():
        sys.stdout.write(f"{dict(counts)}\n")

    assert not wrong
    assert counts["positions"] >= 70


# Attention document by document, by their boundaries, and the choice of an attention.


FAMILIES = {
    **{name: {} for name in ("llama", "gpt2", "gemma3_text", "phi", "qwen3_moe")},
    "mistral": {"sliding_window": 3},
    "gemma2": {"attn_logit_softcapping": None},
}


def tiny_model(tiny, family, dtype=torch.float32, **keys):
    folder = tiny.save(family, **{**FAMILIES.get(family, {}), **keys})
    return tiny.load(folder, tiny.task("causal_lm")).to(dtype).eval()


def attend_with(model, name, device="cpu"):
    source = SimpleNamespace(attn_implementation=name, where="student.model")
    set_attention(model, source, "causal_lm", torch.device(device))  # type: ignore[arg-type]


def hidden_and_gradient(model, batch, name):
    model.set_attn_implementation(name)
    model.zero_grad()
    hidden = read_outputs(model, batch, Needs()).hidden
    (hidden.float() * batch.valid[..., None]).square().sum().backward()
    gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    scaled = {name: gradient / gradient.abs().max() for name, gradient in gradients.items()}
    return hidden.detach()[batch.valid].float(), scaled


@pytest.mark.parametrize(
    ("family", "dtype", "close", "gradient"),
    [
        *((name, torch.float32, 1e-5, 3e-5) for name in FAMILIES),
        *((name, torch.bfloat16, 5e-2, 2e-1) for name in ("llama", "gemma3_text")),
    ],
)
def test_documents_one_by_one_equal_masked_rows(tiny, family, dtype, close, gradient):
    model, batch = tiny_model(tiny, family, dtype), batch_of()
    attend_with(model, VARLEN)

    ours, our_gradients = hidden_and_gradient(model, batch, VARLEN)
    masked = "eager" if family == "gemma2" else "sdpa"
    theirs, their_gradients = hidden_and_gradient(model, batch, masked)

    torch.testing.assert_close(ours, theirs, rtol=close, atol=close)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=0, atol=gradient)


def test_no_mask_is_built(tiny):
    model, masks = tiny_model(tiny, "llama"), []
    attend_with(model, VARLEN)
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, __, named: masks.append(named.get("attention_mask")), with_kwargs=True
    )

    read_outputs(model, batch_of(), Needs())

    assert masks == [None]


def test_without_boundaries_every_row_is_a_document():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)

    actual, _ = attend(None, query, key, value, None, scaling=0.3)

    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(actual, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("family", "dtype", "keys", "device", "chosen"),
    [
        ("llama", torch.bfloat16, {}, "cuda", VARLEN),
        ("llama", torch.float32, {}, "cuda", "sdpa"),
        ("llama", torch.bfloat16, {"attention_dropout": 0.1}, "cuda", "sdpa"),
        ("llama", torch.bfloat16, {"head_dim": 12}, "cuda", "sdpa"),
        ("llama", torch.bfloat16, {}, "cpu", "sdpa"),
        # What only eager attention can compute.
        ("gemma2", torch.bfloat16, {"attn_logit_softcapping": 0.5}, "cuda", "eager"),
        ("gpt_oss", torch.bfloat16, {}, "cuda", "eager"),
    ],
    ids=["gpu", "fp32", "dropout", "width", "cpu", "cap", "sinks"],
)
def test_packed_rows_use_it_on_a_gpu_whose_kernel_supports_the_model(
    tiny, family, dtype, keys, device, chosen
):
    model = tiny_model(tiny, family, dtype, **keys)
    attend_with(model, None, device)
    assert model.config._attn_implementation == chosen


CAP = r"gemma2 model has a cap on attention scores \(attn_logit_softcapping: 0.5\)"


@pytest.mark.parametrize(
    ("family", "name", "device", "message"),
    [
        ("llama", VARLEN, "cuda", r"^student.attn_implementation: varlen needs bf16"),
        *(
            (family, name, "cpu", f"{part}, which {name} does not support; use eager")
            for family, part in (("gemma2", CAP), ("gpt_oss", "gpt_oss model has attention sinks"))
            for name in ("sdpa", VARLEN)
        ),
        ("lfm2", VARLEN, "cpu", r"student\.attn_implementation: varlen does not compute the"),
    ],
)
def test_an_attention_that_leaves_out_a_part_of_the_model_is_refused(
    tiny, family, name, device, message
):
    keys = {"attn_logit_softcapping": 0.5} if family == "gemma2" else {}
    model = model_of(family) if family == "lfm2" else tiny_model(tiny, family, **keys)

    with pytest.raises(ModelError, match=message):
        attend_with(model, name, device)


def test_a_saved_model_opens_with_the_attention_of_transformers(tiny, tmp_path):
    model = tiny_model(tiny, "llama")
    attend_with(model, VARLEN)
    model.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()


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
            return read_outputs(model, batch, Needs()).hidden[batch.valid]

    together = packed_row(collate(rows), most=128)

    assert together.valid.shape == (1, 112)
    alone = torch.cat([hidden(collate([row])) for row in rows])
    torch.testing.assert_close(hidden(together), alone, rtol=1e-4, atol=1e-4)
