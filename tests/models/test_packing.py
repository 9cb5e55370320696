"""Documents in one row: which models compute them as alone, and rows of one document each."""

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
from megakd.contract.batch import Batch
from megakd.data.collation import Collator, documents_of
from megakd.data.token_tables import pack, single_documents
from megakd.errors import ModelError
from megakd.models.knowledge import Needs, read_knowledge
from megakd.models.packed_attention import VARLEN
from megakd.models.packing import Packing, packing_of, set_attention
from megakd.models.structure import for_task

TYPES = sorted(tiny_families.TYPES["causal_lm"])
# Recurrent and convolving layers, some of them between attentions.
MIXING = ("mamba", "lfm2", "lfm3", "qwen3_5_text", "falcon_h1", "jamba", "granitemoehybrid")
DOCUMENTS = (21, 9, 14)
LENGTH = 24
NAMES = """
apertus arcee bamba biogpt bloom cohere cohere2 ernie4_5 exaone4 falcon_h1 falcon_mamba gemma glm
glm4 gpt_bigcode gpt_neox granitemoehybrid helium hunyuan_v1_dense jamba xglm lfm2 lfm3
llama4_text mamba ministral mixtral mpt nemotron olmo olmo2 olmo3 opt phimoe qwen3_5_text
recurrent_gemma seed_oss smollm3 stablelm starcoder2
"""
FORTY = NAMES.split()


class Tokens:
    pad_token_id = 0


def config_of(model_type: str):
    config = tiny_families.small_config(model_type, "causal_lm")
    if model_type == "lfm2":  # a small one has attentions alone
        config.layer_types = ["conv", "full_attention"]
    if getattr(config, "mamba_chunk_size", None):  # a row costs as much as a chunk
        config.mamba_chunk_size = 8
    return config


def model_of(model_type: str, attention: str | None = None):
    model = tiny_families.build(config_of(model_type), "causal_lm")
    for_task(model.config, "causal_lm")
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def batch_of(documents, *, packed: bool, length: int = LENGTH) -> Batch:
    """A padded batch of rows, with a dummy row at the end."""
    task = TaskConfig(type="causal_lm", dataset="unused", max_length=length)
    rows = (pack if packed else single_documents)(documents, length)
    collate = Collator(Tokens(), task)  # type: ignore[arg-type]
    return collate([row._asdict() for row in rows], dummy_rows=1)


def documents(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 500, size=count) for count in DOCUMENTS]


def logits(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        read = read_knowledge(model, batch, Needs())
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
    return packing, largest_difference(model, batch_of(documents(), packed=packing != "apart"))


@pytest.mark.parametrize("model_type", MIXING)
def test_a_padded_row_of_a_recurrent_model_gets_the_logits_that_it_has_alone(model_type):
    model = model_of(model_type)

    assert packing_of(model.config, None) == "apart"
    assert largest_difference(model, batch_of(documents(), packed=False)) < 2e-5


@pytest.mark.parametrize(
    ("model_type", "packing"),
    [
        ("smollm3", "positions"),
        ("olmo3", "positions"),
        ("biogpt", "mask"),
        ("gpt_oss", "masks_by_type"),
    ],
)
def test_a_packed_row_of_an_attention_gets_the_logits_of_its_documents_alone(model_type, packing):
    model = model_of(model_type, "eager" if model_type == "gpt_oss" else None)

    assert packing_of(model.config, model.config._attn_implementation) == packing
    assert largest_difference(model, batch_of(documents(), packed=True)) < 2e-5


@pytest.mark.parametrize("model_type", FORTY)
def test_forty_families_are_packed_only_if_that_changes_no_logits(model_type):
    _, difference = decided(model_type)

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


def test_an_attention_by_boundaries_is_refused_where_the_model_has_another():
    model = model_of("lfm2")
    source = SimpleNamespace(attn_implementation=VARLEN, where="student.model")

    with pytest.raises(
        ModelError, match=r"student\.attn_implementation: varlen does not compute the"
    ):
        set_attention(model, source, "causal_lm", torch.device("cpu"))  # type: ignore[arg-type]
