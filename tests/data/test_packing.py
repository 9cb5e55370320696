"""Packing: nothing lost, labels in place, and no token sees another document."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import unpack
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.config.task import TaskConfig
from megakd.data.collation import Collator
from megakd.data.token_tables import pack

DOCUMENTS = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=40), max_size=12)


class _PadTokenizer:
    """As much of a tokenizer as a collator asks for."""

    pad_token_id = 7


def _collator(length: int) -> Collator:
    task = TaskConfig(type="causal_lm", dataset="none", max_length=length)
    return Collator(_PadTokenizer(), task)


def _llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation=attention,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def _rows(documents: list[list[int]], length: int) -> list[dict[str, list[int]]]:
    return [
        {name: values.tolist() for name, values in row._asdict().items()}
        for row in pack(documents, length)
    ]


@given(documents=DOCUMENTS, length=st.integers(1, 17))
@settings(max_examples=150, deadline=None)
def test_unpacking_gives_the_packed_documents_back(documents, length):
    assert list(unpack(pack(documents, length))) == documents


@given(documents=DOCUMENTS, length=st.integers(1, 17))
@settings(max_examples=150, deadline=None)
def test_every_row_but_the_last_is_full(documents, length):
    lengths = [len(row.input_ids) for row in pack(documents, length)]

    assert all(count == length for count in lengths[:-1])
    assert sum(lengths) == sum(len(document) for document in documents)


@given(documents=DOCUMENTS, length=st.integers(1, 17))
@settings(max_examples=150, deadline=None)
def test_every_token_but_the_first_of_a_document_is_a_target_once(documents, length):
    targets = [label for row in pack(documents, length) for label in row.labels if label != -100]

    assert targets == [token for document in documents for token in document[1:]]


def test_positions_restart_at_every_document_and_every_row():
    first, second, third = pack([[1, 2], [3, 4, 5, 6, 7]], length=3)

    assert first.position_ids.tolist() == [0, 1, 0]
    assert first.labels.tolist() == [2, -100, 4]
    assert second.position_ids.tolist() == [0, 1, 2]
    assert second.labels.tolist() == [5, 6, 7]
    assert (third.input_ids.tolist(), third.labels.tolist()) == ([7], [-100])


def test_a_row_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 1 token, got length 0"):
        list(pack([[1]], 0))


# 19 + 9 tokens in rows of 16: a document that goes on in the next row, and a padded tail;
# 16 + 16: one document of full length in every row, where nothing marks a boundary;
# single tokens: positions that are 0 throughout; 5: one row of one document and padding.
LENGTHS = [(5, 3, 8), (19, 9), (16, 16), (1, 1, 1, 4), (5,), (16, 2, 2, 12, 9, 1)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["eval", "train with checkpointing"])
def test_a_packed_document_gets_the_logits_it_has_alone(lengths, attention, mode):
    model = _llama(attention)
    if mode != "eval":
        model.train()
        model.activation_checkpointing_enable()
    rows = _rows([np.random.default_rng(n).integers(0, 64, n).tolist() for n in lengths], 16)
    batch = _collator(16)(rows, dummy_rows=1)

    packed = model(**batch.inputs).logits

    for row, logits, positions in zip(rows, packed, batch.inputs["position_ids"], strict=False):
        real = positions[: len(row["input_ids"])]
        starts = [*(real == 0).nonzero().flatten().tolist(), len(real)]
        for start, end in pairwise(starts):
            alone = model(input_ids=torch.tensor([row["input_ids"][start:end]])).logits[0]
            torch.testing.assert_close(logits[start:end], alone, atol=1e-5, rtol=1e-5)


def test_padding_changes_no_logits():
    model = _llama()
    row = _rows([[5, 6, 7], [8, 9]], 16)
    batch = _collator(16)(row)
    other = {name: values.clone() for name, values in batch.inputs.items()}
    other["input_ids"][~batch.valid] = 33

    with torch.no_grad():
        logits, others = model(**batch.inputs).logits, model(**other).logits

    assert torch.equal(logits[batch.valid], others[batch.valid])
    assert batch.inputs["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2]


def test_with_a_cache_documents_see_each_other_so_models_must_be_called_without():
    """Fails when transformers learns to look: then the warning in `token_tables` can go."""
    model = _llama()
    batch = _collator(16)(_rows([[5, 6, 7], [8, 9]], 16))

    with torch.no_grad():
        right = model(**batch.inputs, use_cache=False).logits
        wrong = model(**batch.inputs, use_cache=True).logits

    assert not torch.allclose(right[batch.valid], wrong[batch.valid], atol=1e-3)


def test_no_gradient_flows_from_one_document_to_another():
    model = _llama()
    batch = _collator(16)(_rows([[5, 6, 7], [8, 9]], 16))
    embedded = model.get_input_embeddings()(batch.inputs["input_ids"]).detach().requires_grad_()

    out = model(inputs_embeds=embedded, position_ids=batch.inputs["position_ids"]).logits
    out[0, 3:5].sum().backward()

    assert embedded.grad is not None
    assert embedded.grad[0, :3].abs().max() == 0
    assert embedded.grad[0, 5:].abs().max() == 0
    assert embedded.grad[0, 3:5].abs().max() > 0
