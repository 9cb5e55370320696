"""Tokenizers: where they are looked for, what is trained when there is none, what is refused."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import huggingface_hub.constants
import pytest
from datasets import Dataset
from other_process import said_elsewhere
from transformers import AutoTokenizer, BertConfig, LlamaConfig, RobertaConfig

from megakd.config.task import TaskConfig, TokenizerConfig
from megakd.data import tokenizers, vocabularies
from megakd.data.tokenizers import has_tokenizer_files, load_tokenizer
from megakd.errors import DataError

SENTENCES = [
    "The teacher writes a letter.",
    "The student reads the letter of the teacher!",
    "Letters, students and teachers: 42 naïve words.",
    "A student writes to another student.",
]
KINDS = ["wordpiece", "bpe", "unigram"]


class _Splits(NamedTuple):
    train: Any
    content_hash: str = "content"
    stream: Any = None


def _splits(texts=SENTENCES, pairs=None) -> _Splits:
    columns = {"text": list(texts) * 5} | ({"text_pair": list(pairs) * 5} if pairs else {})
    return _Splits(Dataset.from_dict(columns))


def _task(kind="classification", tokenizer=None) -> TaskConfig:
    return TaskConfig(type=kind, dataset="none", tokenizer=tokenizer)


def _recipe(kind, size=400) -> TokenizerConfig:
    return TokenizerConfig(type=kind, vocab_size=size)


def _load(task, tmp_path, *, folders=(), splits=None):
    splits = splits or _splits()
    return load_tokenizer(task, splits, model_folders=folders, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_encoder_tokenizer_frames_texts_and_pairs(tmp_path, kind):
    tokenizer = _load(_task(tokenizer=_recipe(kind)), tmp_path)

    single, pair = tokenizer("The student"), tokenizer("The student", "a letter")

    assert len(tokenizer) <= 400
    assert [single["input_ids"][0], single["input_ids"][-1]] == [
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    ]
    assert pair["input_ids"].count(tokenizer.sep_token_id) == 2
    assert set(pair["token_type_ids"]) == {0, 1}
    assert tokenizer.unk_token_id not in pair["input_ids"]
    assert tokenizer.decode(single["input_ids"], skip_special_tokens=True).strip().lower() == (
        "the student"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_decoder_tokenizer_ends_texts_and_frames_nothing(tmp_path, kind):
    tokenizer = _load(_task("causal_lm", _recipe(kind)), tmp_path)

    ids = tokenizer("The student")["input_ids"]

    assert tokenizer.decode(ids).strip().lower() == "the student"
    assert [tokenizer.eos_token, tokenizer.pad_token] == ["<|endoftext|>"] * 2
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert tokenizer.eos_token_id not in ids


def test_byte_level_bpe_loses_nothing(tmp_path):
    tokenizer = _load(_task("causal_lm", _recipe("bpe")), tmp_path)
    text = "  Ünïcode \n\t and “quotes” 漢字 🙂 "

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_what_texts_are_paired_with_is_trained_on_too(tmp_path):
    splits = _splits(["aaa"] * 2, ["zyx zyx"] * 2)

    tokenizer = _load(_task(tokenizer=_recipe("wordpiece")), tmp_path, splits=splits)

    assert tokenizer.tokenize("zyx") == ["zyx"]


def trained_backends(folder) -> str:
    """All there is to know about one tokenizer of each kind."""
    made = [_load(_task(tokenizer=_recipe(kind)), folder) for kind in KINDS]
    return json.dumps([tokenizer.backend_tokenizer.to_str() for tokenizer in made])


def test_the_same_text_gives_the_same_tokenizers_in_every_process(tmp_path):
    elsewhere = said_elsewhere(__file__, "trained_backends", tmp_path / "there")

    assert elsewhere == trained_backends(tmp_path / "here")


def test_a_trained_tokenizer_is_reused_and_trained_again_when_damaged(tmp_path, monkeypatch):
    task = _task(tokenizer=_recipe("wordpiece"))
    first = _load(task, tmp_path).get_vocab()
    (folder,) = (tmp_path / "cache" / "tokenizers").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers, "train_tokenizer", None)
        assert _load(task, tmp_path).get_vocab() == first

    (folder / "tokenizer.json").write_text("{", encoding="utf-8")

    assert _load(task, tmp_path).get_vocab() == first


def test_other_text_gets_another_tokenizer(tmp_path):
    task = _task(tokenizer=_recipe("wordpiece"))
    first = _load(task, tmp_path).get_vocab()

    assert _load(task, tmp_path, splits=_splits(["quite other text"] * 4)).get_vocab() != first


@pytest.mark.parametrize(
    ("kind", "model"), [("classification", "WordPiece"), ("mlm", "WordPiece"), ("causal_lm", "BPE")]
)
def test_without_any_tokenizer_one_is_trained_to_fit_the_task(tmp_path, kind, model):
    empty = tmp_path / "model"
    empty.mkdir()

    tokenizer = _load(_task(kind), tmp_path, folders=[empty])

    assert type(tokenizer.backend_tokenizer.model).__name__ == model
    assert len(tokenizer) <= 8000


def test_the_first_model_that_has_a_tokenizer_gives_it(tmp_path):
    empty, teacher, student = (tmp_path / name for name in ("empty", "teacher", "student"))
    empty.mkdir()
    _load(_task(tokenizer=_recipe("wordpiece", 320)), tmp_path).save_pretrained(teacher)
    _load(_task(tokenizer=_recipe("unigram", 310)), tmp_path).save_pretrained(student)

    tokenizer = _load(_task(), tmp_path, folders=[empty, teacher, student])

    assert type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"


# Each model type has a tokenizer class of its own, which must not take over.
@pytest.mark.parametrize(
    ("config", "task"),
    [
        (BertConfig(), "classification"),
        (RobertaConfig(), "classification"),
        (LlamaConfig(), "causal_lm"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_beside_a_model_loads_with_transformers_alone(
    tmp_path, config, task, kind
):
    tokenizer = _load(_task(task, _recipe(kind)), tmp_path)
    tokenizer.save_pretrained(tmp_path / "final")
    config.save_pretrained(tmp_path / "final")

    loaded = AutoTokenizer.from_pretrained(tmp_path / "final")

    text = "The naïve Student, reads"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.model_input_names == tokenizer.model_input_names
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


def test_a_bare_tokenizer_json_finds_its_special_tokens(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    trained = _load(_task(tokenizer=_recipe("wordpiece")), tmp_path)
    trained.backend_tokenizer.save(str(folder / "tokenizer.json"))

    tokenizer = _load(_task(tokenizer=str(folder)), tmp_path)

    assert tokenizer("a letter")["input_ids"] == trained("a letter")["input_ids"]
    assert (tokenizer.pad_token, tokenizer.cls_token) == ("[PAD]", "[CLS]")


def test_a_bare_bert_vocabulary_is_read(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "teacher", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")

    tokenizer = _load(_task(tokenizer=str(folder)), tmp_path)

    assert tokenizer("The teachers")["input_ids"] == [2, 5, 6, 7, 3]


def test_a_bare_gpt2_vocabulary_is_read(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")

    tokenizer = _load(_task("causal_lm", str(folder)), tmp_path)

    assert tokenizer("abb")["input_ids"] == [3, 2]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_a_tokenizer_without_a_mask_token_is_refused_for_mlm_alone(tmp_path):
    folder = tmp_path / "maskless"
    _load(_task(tokenizer=_recipe("wordpiece")), tmp_path).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k != "mask_token"}
    settings.write_text(json.dumps(kept))

    assert _load(_task("classification", str(folder)), tmp_path).mask_token is None
    for task, folders in ((_task("mlm", str(folder)), ()), (_task("mlm"), [folder])):
        with pytest.raises(DataError, match=r"maskless.* has no mask token, which mlm puts in th"):
            _load(task, tmp_path, folders=folders)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_has_a_mask_token_for_mlm(tmp_path, kind):
    made = _load(_task("mlm", _recipe(kind)), tmp_path)
    assert made("the [MASK] reads")["input_ids"].count(made.mask_token_id) == 1


@pytest.mark.parametrize("spec", ["./nowhere", "/no/where", "some/where/else"])
def test_a_folder_that_is_not_there_is_named(tmp_path, spec):
    with pytest.raises(DataError, match=f'task.tokenizer "{spec}": the folder does not exist'):
        _load(_task(tokenizer=spec), tmp_path)


def test_a_folder_without_tokenizer_files_says_what_was_looked_for(tmp_path):
    with pytest.raises(
        DataError, match=r"has no tokenizer files; the folder must hold tokenizer\.json, v"
    ):
        _load(_task(tokenizer=str(tmp_path)), tmp_path)


def test_a_file_instead_of_a_folder_is_an_error(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}", encoding="utf-8")

    with pytest.raises(DataError, match="is a file; give the folder that holds it"):
        _load(_task(tokenizer=str(file)), tmp_path)


# Empty objects and cut files fail in different places of transformers and tokenizers.
@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "WordPiece", "vocab": 3}}'])
@pytest.mark.parametrize("beside", [None, "tokenizer_config.json", "config.json"])
def test_a_broken_tokenizer_file_is_named(tmp_path, content, beside):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    if beside:
        (folder / beside).write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")

    with pytest.raises(DataError, match=r"the tokenizer files in .*broken cannot be read"):
        _load(_task(tokenizer=str(folder)), tmp_path)


def test_a_broken_tokenizer_of_a_model_is_not_passed_over(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")

    with pytest.raises(DataError, match=r"the tokenizer files in .*teacher cannot be read"):
        _load(_task(), tmp_path, folders=[folder])


def test_a_hub_id_without_a_network_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(
        DataError, match=r'"no-one/nothing" is not a local folder and cannot be loaded'
    ):
        _load(_task(tokenizer="no-one/nothing"), tmp_path)


def test_text_too_varied_for_the_vocabulary_is_an_error(tmp_path):
    varied = _splits([" ".join(chr(0x4E00 + n) for n in range(600))])

    with pytest.raises(DataError, match=r"a unigram tokenizer of .* cannot be trained"):
        _load(_task(tokenizer=_recipe("unigram", 300)), tmp_path, splits=varied)


def test_a_wordpiece_of_varied_text_keeps_to_its_size(tmp_path):
    varied = _splits(["".join(chr(0x400 + n) for n in range(200)), *SENTENCES])

    tokenizer = _load(_task(tokenizer=_recipe("wordpiece", 300)), tmp_path, splits=varied)

    assert len(tokenizer) <= 300
    assert tokenizer.unk_token_id not in tokenizer("the student")["input_ids"]


# "Hello world" as published for the first two, and as SentencePiece itself has it.
@pytest.mark.parametrize(
    ("name", "size", "ids"),
    [
        ("bert-base-uncased", 30522, [101, 7592, 2088, 102]),
        ("gpt2", 50257, [15496, 995]),
        ("albert", 30000, [2, 5839, 121, 13, 16550, 3]),
    ],
)
def test_published_vocabularies_are_read(tmp_path, shared_data, name, size, ids):
    folder = shared_data / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"needs {name} in ../shared/data/tokenizers")
    kind = "causal_lm" if name == "gpt2" else "classification"

    tokenizer = _load(_task(kind, str(folder)), tmp_path)

    assert has_tokenizer_files(folder)
    assert len(tokenizer) == size
    assert tokenizer("Hello world")["input_ids"] == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_long_word_is_trained_on_in_pieces_and_the_log_says_so(kind, monkeypatch, caplog):
    monkeypatch.setattr(vocabularies, "LONGEST_WORD", 6)
    monkeypatch.setattr(vocabularies, "_LONG_RUN", re.compile(r"\S{7,}"))
    monkeypatch.setattr(vocabularies, "_SENTENCE_BYTES", 60)
    texts = [*["a dog runs", "the cat eats"] * 20, *["abcdefghijklmnop" * 20] * 3]

    tokenizer = vocabularies.train_tokenizer(
        lambda: texts, kind=kind, vocab_size=400, for_encoder=True
    )

    learned = {token.strip("#Ġ▁") for token in tokenizer.get_vocab() if token[0] not in "[<"}
    assert 4 <= max(map(len, learned)) <= 6
    assert "3 word(s) of more than 6 characters, the longest of 320 (abcdefghij" in caplog.text


def test_a_text_without_spaces_is_not_lost_to_a_trained_unigram():
    texts = ["東京大阪" * 1500]

    tokenizer = vocabularies.train_tokenizer(
        lambda: texts, kind="unigram", vocab_size=300, for_encoder=True
    )

    assert {"東", "京", "大", "阪"} <= set("".join(tokenizer.get_vocab()))
