"""Micro-batches as one batch: the same documents, targets and outputs as one by one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from megakd.config.task import TaskConfig
from megakd.data.batch import AttentionVectors, Batch, Outputs
from megakd.data.collation import Collator
from megakd.data.token_tables import pack
from megakd.models.outputs import Needs, read_outputs
from megakd.teachers.frozen import joined, split

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32}
NEEDS = Needs(hidden_layers=(0, 2), attention_layers=(1,))
LENGTHS = ((3, 9, 2), (6,), (1, 14, 14, 5))


def packed(lengths, length=16):
    rng = np.random.default_rng(len(lengths))
    rows = pack((rng.integers(2, 40, size=n) for n in lengths), length)
    task = TaskConfig(type="causal_lm", dataset="d", max_length=length)
    collate = Collator(SimpleNamespace(pad_token_id=0), task)
    return collate([row._asdict() for row in rows], dummy_rows=len(lengths) % 2)


def texts(lengths, targets=()):
    """Rows of an encoder of different lengths; `targets` are predicted."""
    width = -(-max(lengths) // 8) * 8
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 40, valid.shape, generator=torch.Generator().manual_seed(width))
    inputs = {"input_ids": ids.masked_fill(~valid, 0), "attention_mask": valid.long()}
    return Batch(inputs, ids.clone(), valid, torch.tensor(targets) if targets else None)


def outputs(knowledge: Outputs, batch: Batch) -> list[torch.Tensor | None]:
    """The outputs where positions count; padding may hold anything."""
    layers = [*knowledge.hidden_states]
    for vectors in knowledge.attention:
        layers += [None] * 3 if vectors is None else vectors[:3]
    final = knowledge.hidden if batch.targets is not None else knowledge.hidden[batch.valid]
    return [final, *(None if values is None else values[batch.valid] for values in layers)]


def assert_answered_as_one_by_one(model, batches):
    with torch.no_grad():
        together = read_outputs(model, joined(batches), NEEDS)
        for batch, part in zip(batches, split(together, batches), strict=True):
            of_part = outputs(part, batch)
            expected = outputs(read_outputs(model, batch, NEEDS), batch)
            torch.testing.assert_close(of_part, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_packed_micro_batches_are_answered_together_as_one_by_one(attention):
    from megakd.models.packing import register_packed_attention

    register_packed_attention()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()
    model.set_attn_implementation(attention)
    batches = [packed(lengths) for lengths in LENGTHS]
    assert len({batch.valid.shape for batch in batches}) > 1

    assert_answered_as_one_by_one(model, batches)


@pytest.mark.parametrize("predicted", [True, False], ids=["targets", "all"])
def test_masked_texts_are_answered_together_as_one_by_one(predicted):
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES)).eval()
    targets = [(1, 2, 10), (3,), (0, 17, 25, 33)] if predicted else [()] * 3
    lengths = [(5, 3), (8,), (10, 2, 16)]
    batches = [texts(sizes, chosen) for sizes, chosen in zip(lengths, targets, strict=True)]

    assert_answered_as_one_by_one(model, batches)


def test_logits_and_vectors_are_cut_by_rows_and_length():
    batches = [texts((3, 5)), texts((16,))]
    vectors = AttentionVectors(*(torch.arange(3 * 16 * 2.0).view(3, 16, 2) for _ in range(3)), 2)
    answer = Outputs(logits=torch.arange(3.0)[:, None], attention=(None, vectors))

    first, second = split(answer, batches)

    assert first.logits.flatten().tolist() == [0, 1]
    assert second.logits.flatten().tolist() == [2]
    assert first.attention[0] is None
    assert first.attention[1].queries.shape == (2, 8, 2)
    assert torch.equal(second.attention[1].values, vectors.values[2:])
