"""Encoded rows: their tokens, keys, batches and mixtures; no packed document sees another."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from chat_tokenizers import asked, chat_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import unpack
from slow_tokenizer import Words
from tiny_runs import write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megakd.config.task import MixtureSource, TaskConfig
from megakd.data import encoding, token_tables
from megakd.data.chat_tokens import ChatCounts
from megakd.data.collation import Collator
from megakd.data.conversations import ChatColumns
from megakd.data.encoding import Encoded, encode_splits, labelled_only, mixed, tokenizer_content
from megakd.data.rows import RowKind
from megakd.data.splits import Splits, load_splits
from megakd.data.token_tables import PackedRow, pack, single_documents
from megakd.data.tokenizers import encoder_template
from megakd.errors import DataError

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [*SPECIAL.values(), *LETTERS]
MARKER = "<|endoftext|>"
KIND = RowKind("mlm", ChatColumns(text=("text",)))


def key_of_rows(encoded: Encoded) -> str:
    """The folder of the encoded training rows."""
    return Path(encoded.train.cache_files[0]["filename"]).parent.name


def _splits(train: Dataset, validation: Any, test: Any = None) -> Splits:
    return Splits(train, validation, test, (), (), "content", KIND)


def _bert(words=WORDS, **keys) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = encoder_template(backend, cls="[CLS]", sep="[SEP]")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    roles = SPECIAL | keys
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **roles)


def _gpt() -> PreTrainedTokenizerFast:
    vocabulary = {MARKER: 0} | {word: n for n, word in enumerate(LETTERS, start=1)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=MARKER, pad_token=MARKER)


def _task(kind="classification", **keys) -> TaskConfig:
    return TaskConfig(**{"type": kind, "dataset": "none", "max_length": 8} | keys)


def _pairs() -> Splits:
    rows = Dataset.from_dict(
        {"text": ["a b", "c", "d e f"], "text_pair": ["x", "y z", "q"], "label": [0, -100, 1]}
    )
    return _splits(rows, rows.select([0]), rows.select([1, 2]))


def _texts(count=30) -> Splits:
    texts = [" ".join(LETTERS[: 1 + n % 9]) for n in range(count)]
    rows = Dataset.from_dict({"text": texts, "label": [n % 3 for n in range(count)]})
    return _splits(rows, rows.select(range(5)))


def _documents() -> Splits:
    rows = Dataset.from_dict({"text": ["a b c", "d", "e f g h i j k l m n", "", "o p"]})
    return _splits(rows, rows.select([0, 1]))


@pytest.fixture
def encode(tmp_path):
    """Encode splits as a run does."""

    def encode(splits, tokenizer=None, kind="classification", **keys):
        task = _task(kind, **keys)
        return encode_splits(splits, tokenizer or _bert(), task, cache_dir=tmp_path)

    return encode


def test_pairs_get_token_types_and_single_texts_do_not(encode):
    pairs = encode(_pairs())
    texts = encode(_texts())

    tokens = {"input_ids": [2, 4, 5, 3, 27, 3], "token_type_ids": [0, 0, 0, 0, 1, 1]}
    assert pairs.train[0] == tokens | {"label": 0}
    assert texts.train.column_names == ["input_ids", "label"]
    assert pairs.train["label"][:] == [0, -100, 1]
    assert len(pairs.test) == 2
    assert texts.test is None
    assert pairs.tokens_per_row == pytest.approx((6 + 6 + 7) / 3)
    assert max(map(len, encode(_texts(), max_length=5).train["input_ids"])) == 5
    assert texts.train.features["input_ids"].feature.dtype == "int32"
    bare = _bert()
    bare.model_input_names = ["input_ids", "attention_mask"]
    assert "token_type_ids" not in encode(_pairs(), bare).train.column_names


@pytest.mark.parametrize("begin", [[], [0]], ids=["an end", "a begin and an end"])
def test_documents_come_back_with_what_the_tokenizer_puts_around_them(encode, begin):
    tokenizer = _gpt()
    if begin:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{MARKER} $A", special_tokens=[(MARKER, 0)]
        )

    encoded = encode(_documents(), tokenizer, "causal_lm")

    rows = encoded.train.with_format("numpy")
    packed = [PackedRow(r["input_ids"], r["position_ids"], r["labels"]) for r in rows]
    documents = [[1, 2, 3], [4], [*range(5, 15)], [15, 16]]
    assert list(unpack(packed)) == [[*begin, *ids, 0] for ids in documents]
    assert encoded.train.column_names == ["input_ids", "position_ids", "labels"]
    assert encoded.tokens_per_row == pytest.approx((20 + 4 * len(begin)) / 3)


def test_whatever_changes_the_rows_changes_the_key_and_equal_rows_are_read(encode, monkeypatch):
    # Other labels, and a column that differs in one text.
    texts = _texts(1000).train["text"][:]
    many = [texts, *([*texts[:at], "b", *texts[at + 1 :]] for at in (1, 998))]
    others = [Dataset.from_dict({"text": some, "label": [0] * 1000}) for some in many]
    others.append(_texts().train.map(lambda _: {"label": 1}))
    changes = (
        *({"tokenizer": _bert([*WORDS, "##b"])}, {"max_length": 7}, {"kind": "regression"}),
        {"splits": _texts(29)},
        *({"splits": _texts()._replace(train=rows)} for rows in others),
    )
    first = encode(_texts())
    keys = {key_of_rows(encode(**{"splits": _texts(), **change})) for change in changes}
    monkeypatch.setattr(encoding, "write_tables", None)

    again = encode(_texts())

    assert len({*keys, key_of_rows(again)}) == len(changes) + 1
    assert again.train.to_dict() == first.train.to_dict()
    assert [file["filename"] for file in again.train.cache_files]


@pytest.mark.parametrize("file", ["rows.arrow", "checksums.json"])
def test_a_damaged_cache_is_built_again(encode, tmp_path, file):
    first = encode(_texts())
    rows = first.train.to_dict()
    damaged = tmp_path / "encoded" / key_of_rows(first) / file
    content = damaged.read_bytes()
    damaged.unlink()  # a file in its place: the mapped file itself must stay as it is
    damaged.write_bytes(content[: len(content) // 2])

    again = encode(_texts())

    assert (again.train.to_dict(), key_of_rows(again)) == (rows, key_of_rows(first))


def test_a_split_without_tokens_is_an_error(encode):
    splits = _documents()._replace(validation=Dataset.from_dict({"text": ["", ""]}))

    with pytest.raises(DataError, match="validation split has 2 rows and no tokens"):
        encode(splits, _gpt(), "causal_lm")


@pytest.mark.parametrize("labels", [[0, -100, 2], [0.5, math.nan, 2.5]], ids=["class", "score"])
def test_only_rows_with_a_label_are_kept(labels):
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": labels})

    assert labelled_only(rows)["text"][:] == ["a", "c"]
    assert labelled_only(labelled_only(rows))["text"][:] == ["a", "c"]
    documents = _documents().train
    assert labelled_only(documents) is documents
    with pytest.raises(DataError, match="none of the 1 training rows has a label"):
        labelled_only(rows.select([1]))


ROWS = st.lists(st.integers(1, 20), min_size=0, max_size=6)


@given(lengths=ROWS, dummies=st.integers(0, 3), max_length=st.sampled_from([20, 24, 64]))
@settings(max_examples=100)
def test_batches_are_padded_to_the_longest_row_and_no_more(lengths, dummies, max_length):
    collator = Collator(_bert(), _task(max_length=max_length))
    rows = [{"input_ids": [9] * n, "label": n % 3} for n in lengths]
    if not lengths and not dummies:
        return

    batch = collator(rows, dummy_rows=dummies)

    width = min(-(-max([1, *lengths]) // 8) * 8, max_length)
    assert batch.inputs["input_ids"].shape == batch.valid.shape == (len(lengths) + dummies, width)
    assert batch.valid.sum(dim=1).tolist() == [*lengths, *[0] * dummies]
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [*lengths, *[1] * dummies]
    assert batch.labels.tolist() == [*[n % 3 for n in lengths], *[-100] * dummies]


def test_every_form_of_rows_gives_the_same_batch(encode):
    rows = encode(_pairs()).train
    collator = Collator(_bert(), _task())
    forms = [rows[:2], [rows[0], rows[1]], rows.with_format("arrow")[[0, 1]]]
    forms.append(rows.with_format("numpy")[:2])

    batches = [collator(form, dummy_rows=1) for form in forms]

    for batch in batches[1:]:
        assert batch.inputs.keys() == batches[0].inputs.keys()
        for name, values in batch.inputs.items():
            assert torch.equal(values, batches[0].inputs[name])
        assert torch.equal(batch.labels, batches[0].labels)
    assert batches[0].labels.tolist() == [0, -100, -100]
    assert batches[0].inputs["token_type_ids"].tolist()[2] == [0] * 8


def test_scores_stay_fractions_and_labels_of_texts_end_where_the_text_ends():
    score = {"input_ids": [4], "label": 2.5}
    text = {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2], "labels": [6, 7, -100]}

    labels = Collator(_bert(), _task("regression"))([score], dummy_rows=1).labels
    batch = Collator(_gpt(), _task("causal_lm", max_length=20))([text], dummy_rows=1)

    torch.testing.assert_close(labels, torch.tensor([2.5, math.nan]), equal_nan=True)
    assert set(batch.inputs) == {"input_ids", "position_ids"}
    assert batch.labels.tolist() == [[6, 7, *[-100] * 6], [-100] * 8]
    assert batch.valid.tolist() == [[True] * 3 + [False] * 5, [False] * 8]
    assert all(values.dtype == torch.int64 for values in [batch.labels, *batch.inputs.values()])


def _labelled(texts: list[str]) -> Splits:
    rows = Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
    return _splits(rows, rows)


def test_every_setting_of_a_tokenizer_changes_the_key(encode):
    """Some are passed at every call, and a tokenizer without a backend has its own."""
    left, split = {"truncation_side": "left"}, {"split_special_tokens": True}
    for text, plain, other, tokens in (
        ("a a b", _bert(), _bert(**left), [2, 4, 5, 3]),
        ("[PAD]", _bert(), _bert(**split), [2, 1, 1, 3]),
        ("A", Words(), Words(lower=True), [2]),
    ):
        encode(_labelled([text]), plain, max_length=4)
        assert encode(_labelled([text]), other, max_length=4).train["input_ids"][:] == [tokens]
        assert tokenizer_content(plain) != tokenizer_content(other)


def test_neither_a_folder_nor_a_call_changes_the_key_of_a_tokenizer(tmp_path):
    for name in ("one", "two"):
        Words(lower=True).save_pretrained(tmp_path / name)
    tokenizer = _bert()
    before = tokenizer_content(tokenizer)

    tokenizer(["a", "b c d"], truncation=True, max_length=3, padding=True)

    assert tokenizer_content(tokenizer) == before
    one, two = (Words.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert tokenizer_content(one) == tokenizer_content(two)


def test_whatever_a_model_reads_is_in_the_key_of_the_tokens_and_labels_are_not():
    columns = {"input_ids": [[1], [2, 3]], "token_type_ids": [[0], [0, 1]]}
    others: list[dict[str, Any]] = [
        {"input_ids": [[1, 2], [3]]},
        {"input_ids": [[1], [2, 4]]},
        {"input_ids": [[3], [1, 2]]},
        {"input_ids": [[1], [2, 3], []], "token_type_ids": [[0], [0, 1], []]},
        {"token_type_ids": [[0], [1, 1]]},
    ]

    plain, same, *changed = (
        encoding.tokens_key(Dataset.from_dict(columns | more))
        for more in ({"label": [0, 1]}, {"label": [-100, 1]}, *others)
    )

    assert plain == same
    assert len({plain, *changed}) == len(others) + 1


DOCUMENTS = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=40), max_size=12)


@given(documents=DOCUMENTS, length=st.integers(1, 17))
@settings(max_examples=50)
def test_packed_rows_are_full_and_hold_the_documents_and_their_targets(documents, length):
    rows = list(pack(documents, length))

    assert list(unpack(rows)) == documents
    assert all(len(row.input_ids) == length for row in rows[:-1])
    targets = [label for row in rows for label in row.labels if label != -100]
    assert targets == [token for document in documents for token in document[1:]]


@given(documents=DOCUMENTS, length=st.integers(2, 17))
@settings(max_examples=50)
def test_a_row_that_is_not_packed_is_a_window_of_one_document(documents, length):
    rows = list(single_documents(documents, length))

    longer = [document for document in documents if len(document) > 1]
    assert list(unpack(rows)) == longer
    assert len(rows) == sum(-(-len(document) // length) for document in longer)
    assert all(row.position_ids.tolist() == [*range(len(row.input_ids))] for row in rows)
    targets = [label for row in rows for label in row.labels if label != -100]
    assert targets == [token for document in longer for token in document[1:]]


def test_a_call_of_the_tokenizer_gets_few_long_texts(monkeypatch):
    encode = Mock(side_effect=token_tables.plain_encoding)
    monkeypatch.setattr(token_tables, "CHARACTERS_AT_ONCE", 100)
    monkeypatch.setattr(token_tables, "plain_encoding", encode)
    rows = Dataset.from_dict({"text": ["a " * 60, "a", "a " * 20, "a " * 60, "a"]})

    tables = token_tables.tables_of_texts(rows, _gpt(), _task("causal_lm", max_length=16))

    assert sum(row.count(1) for table in tables for row in table["input_ids"].to_pylist()) == 142
    assert [len(call.args[0]) for call in encode.call_args_list] == [1, 3, 1]


def _llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": attention}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False)).eval()


PACKING = Collator(_gpt(), _task("causal_lm", max_length=16))


def _rows(documents: list[list[int]]) -> list[dict[str, list[int]]]:
    rows = pack(documents, 16)
    return [{name: values.tolist() for name, values in row._asdict().items()} for row in rows]


# 19 + 9 tokens in rows of 16: a document that goes on in the next row, and a padded tail;
# 16 + 16: one document of full length in every row, where nothing marks a boundary;
# single tokens: positions that are 0 throughout; 5: one row of one document and padding.
LENGTHS = [(19, 9), (16, 16), (1, 1, 1, 4), (5,), (16, 2, 2, 12, 9, 1)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_gets_the_logits_it_has_alone(lengths, attention):
    model = _llama(attention)
    if attention == "eager":
        model.train()
        model.activation_checkpointing_enable()
    rows = _rows([np.random.default_rng(n).integers(0, 64, n).tolist() for n in lengths])
    batch = PACKING(rows, dummy_rows=1)

    packed = model(**batch.inputs).logits

    for row, logits, positions in zip(rows, packed, batch.inputs["position_ids"], strict=False):
        real = positions[: len(row["input_ids"])]
        starts = [*(real == 0).nonzero().flatten().tolist(), len(real)]
        for start, end in pairwise(starts):
            alone = model(input_ids=torch.tensor([row["input_ids"][start:end]])).logits[0]
            torch.testing.assert_close(logits[start:end], alone, atol=1e-5, rtol=1e-5)


def test_a_text_for_mlm_is_cut_into_framed_windows_of_its_own(encode):
    tokenizer = _bert()
    tokenizer.add_special_tokens({"eos_token": "[UNK]"})  # no part of a window
    encoded = encode(_documents(), tokenizer, "mlm", max_length=6)
    rows = encoded.train["input_ids"][:]

    assert encoded.train.column_names == ["input_ids"]
    # 10 letters where 4 have room: three windows, as even as can be.
    texts = ([4, 5, 6], [7], [8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19])
    assert rows == [[2, *text, 3] for text in texts]
    assert encoded.tokens_per_row == pytest.approx(28 / 6)


def test_a_window_without_room_for_text_is_refused(encode):
    with pytest.raises(DataError, match=r"task\.max_length is 2, but the tokenizer adds 2 special"):
        encode(_documents(), kind="mlm", max_length=2)


# Mixtures: exact shares of every source, chosen by config and seed alone.

TOKENIZER = chat_tokenizer("chatml", merges=False)
SOURCES = {
    "chat": [{"messages": asked(f"Question {n}", "Answer")} for n in range(30)],
    "pairs": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(9)],
    "books": [{"text": f"a long text with the number {n}. " * 5} for n in range(12)],
}


def mixture_of(folder: Path, **weights: float) -> TaskConfig:
    files = {name: str(write_jsonl(folder / f"{name}.jsonl", SOURCES[name])) for name in weights}
    parts = {n: MixtureSource(files=files[n], weight=weight) for n, weight in weights.items()}
    held = str(write_jsonl(folder / "held.jsonl", [{"messages": asked("Hi", "Hello")}]))
    return TaskConfig(type="causal_lm", mixture=parts, validation_files=held, max_length=32)


def encoded_of(folder: Path, *, seed: int = 0, **weights: float) -> Encoded:
    """The rows of an epoch."""
    given, cache = mixture_of(folder, **weights), folder / "cache"
    splits = load_splits(given, seed=seed, cache_dir=cache)
    encoded = encode_splits(splits, TOKENIZER, given, cache_dir=cache)
    return mixed(encoded, given.mixture or {}, seed=seed)


def test_rows_are_mixed_by_weight_as_they_are_encoded(tmp_path):
    """A document of a book is cut into several rows, and each counts."""
    encoded = encoded_of(tmp_path, chat=0.5, pairs=0.3, books=0.2)

    assert list(encoded.chat) == ["train/chat", "train/pairs", "train/books", "validation"]
    assert encoded.train.column_names == ["input_ids", "labels", "prompt_length"]
    tally = encoded.chat["train/books"]
    assert (tally.rows, encoded.chat["train/chat"].kept) == (12, 30)
    assert tally.kept > 4 * tally.rows
    total = tally.kept / 0.2  # the books have the most rows for their weight
    signs = {"chat": "Question", "pairs": " + 1 ="}
    texts = TOKENIZER.batch_decode(encoded.train["input_ids"][:])
    sources = Counter(next((n for n in signs if signs[n] in text), "books") for text in texts)
    expected = {"chat": round(0.5 * total), "pairs": round(0.3 * total), "books": tally.kept}
    assert sources == expected
    counts = Counter(map(tuple, encoded.train["input_ids"][:]))
    assert len(counts) >= 30 + 9 + 12
    lengths = [len(ids) for ids in encoded.train["input_ids"][:]]
    assert encoded.tokens_per_row == pytest.approx(sum(lengths) / len(lengths), rel=0.02)


def test_the_rows_of_an_epoch_depend_on_the_seed_and_the_weights_alone(tmp_path):
    weights = {"chat": 0.6, "pairs": 0.4}
    first, again, other = (encoded_of(tmp_path, seed=seed, **weights) for seed in (1, 1, 2))

    assert first.train["input_ids"][:] == again.train["input_ids"][:]
    assert first.train["input_ids"][:] != other.train["input_ids"][:]
    weighed = encoded_of(tmp_path, chat=1, pairs=9)
    assert first.train["input_ids"][:] != weighed.train["input_ids"][:]


def test_a_source_whose_rows_are_all_left_out_is_refused(tmp_path):
    given = mixture_of(tmp_path, chat=0.5, pairs=0.5)
    tally = {"train/chat": ChatCounts(rows=9, kept=9), "train/pairs": ChatCounts(rows=3)}
    encoded: Any = SimpleNamespace(chat=tally)

    with pytest.raises(DataError, match=r"task\.mixture\.pairs: no row is left .* 3 of its rows"):
        mixed(encoded, given.mixture or {}, seed=0)


def test_a_file_in_two_sources_is_refused(tmp_path):
    source = mixture_of(tmp_path, chat=0.5).mixture["chat"]
    twice = TaskConfig(type="causal_lm", mixture={"a": source, "b": source})

    with pytest.raises(DataError, match=r"task\.mixture\.b\.files.*task\.mixture\.a\.files"):
        load_splits(twice, seed=0, cache_dir=tmp_path / "cache")
