"""Inputs of a run: data, one tokenizer, and models that fit it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from megakd.config.models import ScratchModel, StudentConfig, TeacherConfig
from megakd.config.run import RunConfig
from megakd.config.task import TaskConfig, TokenizerConfig
from megakd.config.train import FinetuneOverrides
from megakd.contract.views import Shape
from megakd.errors import TeacherError
from megakd.inputs.inputs import prepare
from megakd.losses.objective import shape_of
from megakd.methods.single import SingleConfig

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film")
SPECIAL = {f"{word[1:-1].lower()}_token": word for word in WORDS[:5]}
SIZE = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
SIZE |= {"max_position_embeddings": 32}


def model_folder(folder: Path, words: tuple[str, ...] = WORDS, **changes: Any) -> str:
    torch.manual_seed(0)
    names = {0: "bad", 1: "good"}
    config = BertConfig(
        **{**SIZE, "vocab_size": 32, "num_hidden_layers": 2, "id2label": names, **changes}
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=WORDS[1]))  # type: ignore[call-arg]
    plain.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=plain, **SPECIAL).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = "\n".join(["text\tlabel", *["good film\tgood", "bad film\tbad"] * 4]) + "\n"
    for split in ("train", "validation"):
        (folder / f"{split}.tsv").write_text(rows)
    return folder


def config_of(data: Path, *, teacher: str, student: Any, tokenizer: str | None = None) -> RunConfig:
    return RunConfig(
        output_dir=data.parent / "run",
        task=TaskConfig(
            type="classification", dataset=str(data), max_length=16, tokenizer=tokenizer
        ),
        teacher=TeacherConfig(model=teacher),
        student=StudentConfig(model=student),
        method=SingleConfig(name="single"),
    )


def scratch() -> ScratchModel:
    sizes = {**SIZE, "hidden_size": 4, "num_hidden_layers": 1}
    return ScratchModel(config={"model_type": "bert", **sizes})


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return model_folder(tmp_path / "teacher")


def test_a_run_is_prepared_without_loading_any_weights(data, teacher, monkeypatch):
    config = config_of(data, teacher=teacher, student=scratch())
    monkeypatch.setattr("megakd.models.weights.WeightReader", None)

    prepared = prepare(config)

    def shape(role: str) -> Shape:
        return shape_of(prepared.sources[role], config.task.type, prepared.classes)

    assert list(prepared.sources) == ["teacher", "student"]
    assert prepared.splits.label_names == ("bad", "good")
    assert len(prepared.encoded.train) == 8
    assert prepared.metric.name == "accuracy"
    assert shape("teacher") == (2, 8, 2, (2, 2, 4))  # layers, width, classes, heads
    assert shape("student") == (1, 4, 2, (2, 2, 2))
    student = prepared.sources["student"].config
    assert (student.vocab_size, student.pad_token_id) == (len(WORDS), 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WORDS, "more", "words"), r"student\.model .*has a tokenizer of 10 tokens, .* 8 "),
        (
            (*WORDS[:-1], "movie"),
            r"only one of them has (film|movie) \(7\), (film|movie) \(7\)\)",
        ),
    ],
    ids=["more words", "other words"],
)
def test_models_with_different_vocabularies_are_refused_unless_a_tokenizer_is_chosen(
    data, teacher, tmp_path, words, message
):
    student = model_folder(tmp_path / "student", words)

    with pytest.raises(TeacherError, match=message):
        prepare(config_of(data, teacher=teacher, student=student))

    prepared = prepare(config_of(data, teacher=teacher, student=student, tokenizer=student))
    assert len(prepared.tokenizer) == len(words)


def test_models_of_one_vocabulary_and_different_embedding_sizes_are_fine(data, teacher, tmp_path):
    student = model_folder(tmp_path / "student", vocab_size=64, num_hidden_layers=1)

    assert len(prepare(config_of(data, teacher=teacher, student=student)).tokenizer) == len(WORDS)


def with_a_gap(folder: str, number: int) -> str:
    file = Path(folder) / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["vocab"]["far"] = number
    file.write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    ("role", "rows", "cure"),
    [
        ("teacher", {"teacher": 40}, "remove far"),
        ("student", {"student": 40}, r"raise student\.model\.config\.vocab_size"),
    ],
)
def test_a_token_without_a_row_is_refused_by_name(data, tmp_path, role, rows, cure):
    teacher = with_a_gap(model_folder(tmp_path / "t", vocab_size=rows.get("teacher", 41)), 40)
    student = ScratchModel(config={**scratch().config, "vocab_size": rows.get("student", 41)})

    message = rf"^{role}\.model: the token far .* number 40, .* 40 rows; .*, or {cure}$"
    with pytest.raises(TeacherError, match=message):
        prepare(config_of(data, teacher=teacher, student=student))


def test_a_new_model_has_a_row_for_the_largest_number_of_a_token(data, tmp_path):
    teacher = with_a_gap(model_folder(tmp_path / "teacher", vocab_size=64), 40)
    prepared = prepare(config_of(data, teacher=teacher, student=scratch()))
    assert (len(prepared.tokenizer), prepared.sources["student"].config.vocab_size) == (9, 41)


def without_tokenizer(folder: str) -> str:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path(folder) / name).unlink()
    return folder


def test_the_token_that_tells_two_tokenizers_apart_is_named(data, teacher, tmp_path):
    student = model_folder(tmp_path / "student", (*WORDS, "<pad>"))

    message = r"8 tokens \(only one of them has <pad> \(8\)\); soft .* set task\.tokenizer to one"
    with pytest.raises(TeacherError, match=message):
        prepare(config_of(data, teacher=teacher, student=student))
    assert prepare(config_of(data, teacher=teacher, student=student, tokenizer=teacher))


@pytest.mark.parametrize("finetune", [None, FinetuneOverrides()], ids=["given", "finetuned"])
def test_weights_without_a_tokenizer_are_refused_before_one_is_trained(data, teacher, finetune):
    config = config_of(data, teacher=without_tokenizer(teacher), student=scratch())
    config = dataclasses.replace(config, teacher=TeacherConfig(model=teacher, finetune=finetune))
    (data / "train.tsv").unlink()

    message = r"teacher\.model: .*teacher has weights and no .*set task\.tokenizer to"
    with pytest.raises(TeacherError, match=message):
        prepare(config)


def test_weights_without_a_tokenizer_do_not_take_that_of_another_model(data, teacher, tmp_path):
    student = without_tokenizer(model_folder(tmp_path / "student", num_hidden_layers=1))

    with pytest.raises(TeacherError, match=r"student\.model: .* no tokenizer files"):
        prepare(config_of(data, teacher=teacher, student=student))

    prepared = prepare(config_of(data, teacher=teacher, student=student, tokenizer=teacher))
    assert len(prepared.tokenizer) == len(WORDS)


def test_a_tokenizer_trained_on_the_text_does_not_replace_the_teachers_own(data, tmp_path):
    teacher = model_folder(tmp_path / "teacher", vocab_size=400)
    config = config_of(data, teacher=teacher, student=scratch())
    recipe = TokenizerConfig(type="wordpiece", vocab_size=300)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, tokenizer=recipe))

    with pytest.raises(TeacherError, match=r"teacher has a tokenizer of 8 tokens"):
        prepare(config)


def test_a_named_tokenizer_whose_numbers_differ_from_a_models_own_is_told(
    data, teacher, tmp_path, caplog
):
    named = model_folder(tmp_path / "named", (*WORDS[:-2], WORDS[-1], WORDS[-2], "more"))

    prepare(config_of(data, teacher=teacher, student=scratch(), tokenizer=named))

    assert "teacher.model: 2 of the 8 tokens of the model's own tokenizer" in caplog.text
