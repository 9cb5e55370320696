"""Windows and packed rows: no token is lost, and no document sees another."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import unpack
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megakd.config.task import TaskConfig
from megakd.data import token_tables
from megakd.data.collation import Collator
from megakd.data.encoding import Encoded, encode_splits
from megakd.data.splits import Splits
from megakd.data.token_tables import pack, windows
from megakd.errors import DataError

DOCUMENTS = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=40), max_size=12)


def _collator(length: int) -> Collator:
    task = TaskConfig(type="causal_lm", dataset="none", max_length=length)
    return Collator(SimpleNamespace(pad_token_id=7), task)


def _llama(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": attention}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).eval()


def _rows(documents: list[list[int]], length: int) -> list[dict[str, list[int]]]:
    return [
        {name: values.tolist() for name, values in row._asdict().items()}
        for row in pack(documents, length)
    ]


@given(documents=DOCUMENTS, length=st.integers(1, 17))
@settings(max_examples=50)
def test_packed_rows_are_full_and_hold_the_documents_and_their_targets(documents, length):
    rows = list(pack(documents, length))

    assert list(unpack(rows)) == documents
    assert all(len(row.input_ids) == length for row in rows[:-1])
    targets = [label for row in rows for label in row.labels if label != -100]
    assert targets == [token for document in documents for token in document[1:]]


def test_a_call_of_the_tokenizer_gets_few_long_texts(monkeypatch):
    sizes: list[int] = []
    encode = token_tables.plain_encoding
    monkeypatch.setattr(token_tables, "CHARACTERS_AT_ONCE", 100)
    monkeypatch.setattr(
        token_tables,
        "plain_encoding",
        lambda texts, *a: sizes.append(len(texts)) or encode(texts, *a),
    )
    rows = Dataset.from_dict({"text": ["a " * 60, "a", "a " * 20, "a " * 60, "a"]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "e": 1}, "a"))
    )
    tokenizer.add_special_tokens({"eos_token": "e"})
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    tables = token_tables.tables_of_texts(
        rows, tokenizer, TaskConfig(type="causal_lm", dataset="none", max_length=16)
    )

    assert sum(row.count(0) for table in tables for row in table["input_ids"].to_pylist()) == 142
    assert sizes == [1, 3, 1]


def test_positions_restart_at_every_document_and_every_row():
    first, second, third = pack([[1, 2], [3, 4, 5, 6, 7]], length=3)

    assert first.position_ids.tolist() == [0, 1, 0]
    assert first.labels.tolist() == [2, -100, 4]
    assert second.position_ids.tolist() == [0, 1, 2]
    assert second.labels.tolist() == [5, 6, 7]
    assert (third.input_ids.tolist(), third.labels.tolist()) == ([7], [-100])


# 19 + 9 tokens in rows of 16: a document that goes on in the next row, and a padded tail;
# 16 + 16: one document of full length in every row, where nothing marks a boundary;
# single tokens: positions that are 0 throughout; 5: one row of one document and padding.
LENGTHS = [(19, 9), (16, 16), (1, 1, 1, 4), (5,), (16, 2, 2, 12, 9, 1)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(
    ("attention", "mode"), [("sdpa", "eval"), ("eager", "train with checkpointing")]
)
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

    assert embedded.grad[0, :3].abs().max() == 0
    assert embedded.grad[0, 5:].abs().max() == 0
    assert embedded.grad[0, 3:5].abs().max() > 0


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
TEXTS = ["a b c", "d", "e f g h i j k l m n", "", "o p"]


def _tokenizer(**roles: str) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=SPECIAL[1]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    roles = {"pad_token": SPECIAL[0], **roles}
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def _task(max_length: int = 8) -> TaskConfig:
    return TaskConfig(type="mlm", dataset="none", max_length=max_length)


def _encoded(tmp_path, tokenizer=None, **keys) -> Encoded:
    rows = Dataset.from_dict({"text": TEXTS})
    splits = Splits(rows, rows, None, (), (), "content")
    return encode_splits(splits, tokenizer or _tokenizer(), _task(**keys), cache_dir=tmp_path)


@given(st.lists(st.integers(), max_size=200), st.integers(1, 50))
@settings(max_examples=40)
def test_windows_lose_nothing_and_are_few_full_and_alike(ids, room):
    cut = [*windows(ids, room)]

    assert [token for window in cut for token in window] == ids
    assert len(cut) == -(-len(ids) // room)
    lengths = {len(window) for window in cut}
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert all(1 <= length <= room for length in lengths)


def test_a_text_for_mlm_is_cut_into_framed_windows_of_its_own(tmp_path):
    encoded = _encoded(tmp_path, _tokenizer(eos_token=SPECIAL[1]), max_length=6)
    rows = encoded.train["input_ids"][:]

    assert encoded.train.column_names == ["input_ids"]
    # 10 letters where 4 have room: three windows, as even as can be.
    assert rows == [
        [2, 4, 5, 6, 3],
        [2, 7, 3],
        [2, 8, 9, 10, 3],
        [2, 11, 12, 13, 3],
        [2, 14, 15, 16, 17, 3],
        [2, 18, 19, 3],
    ]
    assert encoded.tokens_per_row == pytest.approx(28 / 6)


def test_a_window_without_room_for_text_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"task\.max_length is 2, but the tokenizer adds 2 special"):
        _encoded(tmp_path, max_length=2)
