"""SentencePiece models: read as SentencePiece reads them, framed as their families do."""

from __future__ import annotations

import io
import json
from typing import Any, NamedTuple

import pytest
import sentencepiece
from datasets import Dataset

from megakd.config.task import TaskConfig
from megakd.data.tokenizers import from_folder, load_tokenizer
from megakd.errors import DataError

SENTENCES = [
    "The teacher writes a letter.",
    "The student reads the letter of the teacher!",
    "Letters, students and teachers: 42 naïve words.",
    "A student writes to another student.",
]


class _Splits(NamedTuple):
    train: Any
    content_hash: str = "content"
    stream: Any = None


def _task(kind="classification", tokenizer=None) -> TaskConfig:
    return TaskConfig(type=kind, dataset="none", tokenizer=tokenizer)


def _load(task, tmp_path):
    splits = _Splits(Dataset.from_dict({"text": SENTENCES}))
    return load_tokenizer(task, splits, model_folders=(), cache_dir=tmp_path / "cache")


def _sentencepiece(kind: str, **options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type=kind,
        vocab_size=60,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("name", ["tokenizer.model", "anything.model"])
def test_a_bare_sentencepiece_model_is_read_as_sentencepiece_reads_it(tmp_path, kind, name):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / name).write_bytes(_sentencepiece(kind))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))

    tokenizer = _load(_task("causal_lm", str(folder)), tmp_path)

    text = "The  naïve student reads letters."
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
    assert len(tokenizer) == len(reference)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)


def test_a_sentencepiece_model_frames_texts_for_an_encoder(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "a.model").write_bytes(_sentencepiece("unigram", pad_id=3))

    tokenizer = _load(_task(tokenizer=str(folder)), tmp_path)

    assert tokenizer("")["input_ids"] == [1, 2]
    assert tokenizer.pad_token_id == 3


# With its config transformers' own class reads it, which adds T5's sentinels.
@pytest.mark.parametrize(("model_type", "extra"), [(None, 0), ("t5", 100), ("mt5", 100)])
def test_a_sentencepiece_model_of_t5_ends_every_text(tmp_path, model_type, extra):
    folder = tmp_path / "t5"
    folder.mkdir()
    roles = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    (folder / "spiece.model").write_bytes(_sentencepiece("unigram", **roles))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))

    tokenizer = _load(_task(tokenizer=str(folder)), tmp_path)

    one, two = reference.encode(["the student", "reads"])
    assert tokenizer("the student", "reads")["input_ids"] == [*one, 1, *two, 1]
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer) == len(reference) + extra
    tokenizer.save_pretrained(tmp_path / "again")
    assert from_folder(tmp_path / "again", "classification")("reads")["input_ids"] == [*two, 1]


def test_an_encoder_needs_a_pad_token(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "a.model").write_bytes(_sentencepiece("unigram"))

    with pytest.raises(DataError, match="has no pad token, which classification needs"):
        _load(_task(tokenizer=str(folder)), tmp_path)


def test_a_decoder_does_without_pad_and_end_tokens(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "a.model").write_bytes(_sentencepiece("unigram", bos_id=-1, eos_id=-1))

    assert _load(_task("causal_lm", str(folder)), tmp_path).pad_token is None
