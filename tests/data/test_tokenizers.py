"""Tokenizers: where they are looked for, what is trained when there is none, what is refused."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
import sentencepiece
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, LlamaConfig, RobertaConfig

from megakd.config.task import TaskConfig, TokenizerConfig
from megakd.data import tokenizers
from megakd.data.tokenizers import from_folder, has_tokenizer_files, load_tokenizer
from megakd.errors import DataError

SENTENCES = [
    "The teacher writes a letter.",
    "The student reads the letter of the teacher!",
    "Letters, students and teachers: 42 naïve words.",
    "A student writes to another student.",
]
KINDS = ["wordpiece", "bpe"]


def recipe(kind, size=400):
    return TokenizerConfig(type=kind, vocab_size=size)


@pytest.fixture
def load(tmp_path):
    """Load the tokenizer of a task: of a recipe, of a folder, or of its models and texts."""

    def load(tokenizer=None, task="classification", *, folders=(), texts=SENTENCES, **columns):
        given = tokenizer if isinstance(tokenizer, TokenizerConfig | None) else str(tokenizer)
        rows = Dataset.from_dict({"text": [*texts] * 5, **columns})
        splits = SimpleNamespace(train=rows, stream=None)
        config = TaskConfig(type=task, dataset="none", tokenizer=given)
        return load_tokenizer(config, splits, model_folders=folders, cache_dir=tmp_path / "cache")

    return load


@pytest.fixture
def folder(tmp_path):
    """An empty folder."""
    (tmp_path / "bare").mkdir()
    return tmp_path / "bare"


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_encoder_tokenizer_frames_texts_and_pairs(load, kind):
    tokenizer = load(recipe(kind))

    single, pair = tokenizer("The student"), tokenizer("The student", "a letter")

    assert len(tokenizer) <= 400
    assert single["input_ids"][0] == tokenizer.cls_token_id
    assert single["input_ids"][-1] == tokenizer.sep_token_id
    assert pair["input_ids"].count(tokenizer.sep_token_id) == 2
    assert set(pair["token_type_ids"]) == {0, 1}
    assert tokenizer.unk_token_id not in pair["input_ids"]
    text = tokenizer.decode(single["input_ids"], skip_special_tokens=True)
    assert text.strip().lower() == "the student"
    made = load(recipe(kind), "mlm")
    assert made("the [MASK] reads")["input_ids"].count(made.mask_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_decoder_tokenizer_ends_texts_and_frames_nothing(load, kind):
    tokenizer = load(recipe(kind), "causal_lm")

    ids = tokenizer("The student")["input_ids"]

    assert tokenizer.decode(ids).strip().lower() == "the student"
    assert [tokenizer.eos_token, tokenizer.pad_token] == ["<|endoftext|>", None]
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert tokenizer.eos_token_id not in ids


def test_byte_level_bpe_loses_nothing_and_pairs_are_trained_on_too(load):
    tokenizer = load(recipe("bpe"), "causal_lm")
    of_pairs = load(recipe("wordpiece"), texts=["aaa"] * 2, text_pair=["zyx zyx"] * 10)
    text = "  Ünïcode \n\t and “quotes” 漢字 🙂 "

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert of_pairs.tokenize("zyx") == ["zyx"]


def test_a_trained_tokenizer_is_reused_and_trained_again_when_damaged(load, tmp_path, monkeypatch):
    first = load(recipe("wordpiece")).get_vocab()
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers, "train_tokenizer", None)
        assert load(recipe("wordpiece")).get_vocab() == first

    (kept / "tokenizer.json").write_text("{", encoding="utf-8")

    assert load(recipe("wordpiece")).get_vocab() == first
    assert load(recipe("wordpiece"), texts=["quite other text"]).get_vocab() != first


@pytest.mark.parametrize(
    ("task", "model"), [("classification", "WordPiece"), ("mlm", "WordPiece"), ("causal_lm", "BPE")]
)
def test_without_any_tokenizer_one_is_trained_to_fit_the_task(load, folder, task, model):
    tokenizer = load(task=task, folders=[folder])

    assert type(tokenizer.backend_tokenizer.model).__name__ == model
    assert len(tokenizer) <= 8000


def test_the_first_model_that_has_a_tokenizer_gives_it(load, folder, tmp_path):
    for name, kind in {"teacher": "wordpiece", "student": "bpe"}.items():
        load(recipe(kind, 320)).save_pretrained(tmp_path / name)

    tokenizer = load(folders=[folder, tmp_path / "teacher", tmp_path / "student"])

    assert type(tokenizer.backend_tokenizer.model).__name__ == "WordPiece"


# Each model type has a tokenizer class of its own, which must not take over.
@pytest.mark.parametrize(
    ("config", "kind"), [(BertConfig, "wordpiece"), (RobertaConfig, "bpe"), (LlamaConfig, "bpe")]
)
def test_a_tokenizer_beside_a_model_loads_with_transformers(load, folder, config, kind):
    task = "causal_lm" if config is LlamaConfig else "classification"
    tokenizer = load(recipe(kind), task)
    tokenizer.save_pretrained(folder)
    config().save_pretrained(folder)

    loaded = AutoTokenizer.from_pretrained(folder)

    text = "The naïve Student, reads"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.model_input_names == tokenizer.model_input_names
    assert loaded.special_tokens_map == tokenizer.special_tokens_map


BERT = {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nteacher\n##s"}
GPT_2 = {
    "vocab.json": '{"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}',
    "merges.txt": "#version: 0.2\na b\n",
}


@pytest.mark.parametrize(
    ("files", "task", "text", "ids", "roles"),
    [
        (BERT, "classification", "The teachers", [2, 5, 6, 7, 3], (None, 0)),
        (GPT_2, "causal_lm", "abb", [3, 2], (0, None)),
    ],
    ids=["bert", "gpt2"],
)
def test_a_bare_vocabulary_is_read(load, folder, files, task, text, ids, roles):
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")

    tokenizer = load(folder, task)

    assert tokenizer(text)["input_ids"] == ids
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == roles


def test_a_classifier_without_a_pad_token_takes_the_end_token(load, folder, caplog):
    load(recipe("bpe"), "causal_lm").save_pretrained(folder)
    with caplog.at_level("INFO", logger="megakd"):
        tokenizer = load(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert "has no pad token: its end token <|endoftext|> is taken" in caplog.text
    assert load(folder, "causal_lm").pad_token is None


@pytest.mark.parametrize(
    ("role", "task", "other"),
    [("mask", "mlm", "classification"), ("pad", "classification", "causal_lm")],
)
def test_a_tokenizer_that_lacks_a_token_of_the_task_is_refused(load, folder, role, task, other):
    load(recipe("wordpiece")).save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    tokens = {k: v for k, v in json.loads(settings.read_text()).items() if k != f"{role}_token"}
    settings.write_text(json.dumps(tokens))

    assert getattr(load(folder, other), f"{role}_token") is None
    for spec, folders in ((folder, ()), (None, [folder])):
        with pytest.raises(DataError, match=rf"bare.* has no {role} token, which {task} needs"):
            load(spec, task, folders=folders)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./nowhere", 'task.tokenizer "./nowhere": the folder does not exist'),
        ("some/where/else", 'task.tokenizer "some/where/else": the folder does not exist'),
        # tests/conftest.py sets HF_HUB_OFFLINE
        ("no-one/nothing", '"no-one/nothing" is not a local folder and cannot be loaded'),
        ("{bare}", r"bare.* has no tokenizer files; the folder must hold tokenizer\.json "),
    ],
)
def test_a_tokenizer_that_is_not_there_is_named(load, folder, spec, message):
    with pytest.raises(DataError, match=message):
        load(spec.format(bare=folder))


# Empty objects and cut files fail in different places of transformers and tokenizers.
@pytest.mark.parametrize(
    ("content", "beside"),
    [("{", "config.json"), ("{}", "tokenizer_config.json"), ('{"model": 3}', "config.json")],
)
def test_a_broken_tokenizer_file_is_named_and_not_passed_over(load, folder, content, beside):
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    (folder / beside).write_text(json.dumps({"model_type": "bert"}), encoding="utf-8")

    for spec, folders in ((folder, ()), (None, [folder])):
        with pytest.raises(DataError, match=r"the tokenizer files in .*bare cannot be read"):
            load(spec, folders=folders)


def test_a_wordpiece_of_varied_text_keeps_to_its_size(load):
    varied = ["".join(chr(0x400 + n) for n in range(200)), *SENTENCES]

    tokenizer = load(recipe("wordpiece", 300), texts=varied)

    assert len(tokenizer) <= 300
    assert tokenizer.unk_token_id not in tokenizer("the student")["input_ids"]


# "Hello world" as published.
@pytest.mark.parametrize(
    ("name", "size", "ids"),
    [("bert-base-uncased", 30522, [101, 7592, 2088, 102]), ("gpt2", 50257, [15496, 995])],
)
def test_published_vocabularies_are_read(load, shared_data, name, size, ids):
    published = shared_data / "tokenizers" / name
    if not published.is_dir():
        pytest.skip(f"needs {name} in ../shared/data/tokenizers")

    tokenizer = load(published, "causal_lm" if name == "gpt2" else "classification")

    assert has_tokenizer_files(published)
    assert len(tokenizer) == size
    assert tokenizer("Hello world")["input_ids"] == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_very_long_word_is_trained_on_in_pieces(kind, monkeypatch):
    monkeypatch.setattr(tokenizers, "LONGEST_WORD", 6)
    texts = [*["a dog runs", "the cat eats"] * 20, *["abcdefghijklmnop" * 20] * 3]

    options = {"kind": kind, "vocab_size": 400, "for_encoder": True}
    tokenizer = tokenizers.train_tokenizer(lambda: texts, **options)

    learned = {token.strip("#Ġ▁") for token in tokenizer.get_vocab() if token[0] not in "[<"}
    assert 4 <= max(map(len, learned)) <= 6


def write_sentencepiece(path, **options):
    """Train a SentencePiece model, and return it as SentencePiece reads it."""
    model, sizes = io.BytesIO(), {"vocab_size": 60, "hard_vocab_limit": False, "num_threads": 1}
    texts = {"sentence_iterator": iter(SENTENCES * 20), "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(model_writer=model, **texts, **sizes, **options)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_a_tokenizer_json_or_a_sentencepiece_model_without_its_config_is_refused(load, folder):
    write_sentencepiece(folder / "tokenizer.model")
    with pytest.raises(DataError, match=r"must hold tokenizer\.json .* or config\.json"):
        load(folder)

    (folder / "tokenizer.model").unlink()
    load(recipe("wordpiece")).backend_tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(DataError, match=r"must hold tokenizer\.json .* with its tokenizer_config"):
        load(folder)


def test_a_sentencepiece_model_of_t5_ends_every_text(load, folder, tmp_path):
    """The class of transformers adds T5's sentinels."""
    roles = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    reference = write_sentencepiece(folder / "spiece.model", **roles)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))

    tokenizer = load(folder)

    one, two = reference.encode(["the student", "reads"])
    assert tokenizer("the student", "reads")["input_ids"] == [*one, 1, *two, 1]
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer) == len(reference) + 100
    tokenizer.save_pretrained(tmp_path / "again")
    assert from_folder(tmp_path / "again")("reads")["input_ids"] == [*two, 1]
