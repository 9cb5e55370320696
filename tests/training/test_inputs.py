"""Inputs of a run: data, one tokenizer, and models that fit it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import lab_scene
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from megakd.config.run import RunConfig
from megakd.config.sections import FinetuneOverrides, ScratchModel, StudentConfig, TeacherConfig
from megakd.config.task import TaskConfig, TokenizerConfig
from megakd.errors import TeacherError
from megakd.training.inputs import prepare

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
    rows = "\n".join(["text\tlabel", *["good film\tgood", "bad film\tbad"] * 4]) + "\n"
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.tsv").write_text(rows)
    return tmp_path / "data"


def config_of(data: Path, *, teacher: str, student: Any, tokenizer: str | None = None) -> RunConfig:
    task = TaskConfig(type="classification", dataset=str(data), max_length=16, tokenizer=tokenizer)
    models = {"teacher": TeacherConfig(model=teacher), "student": StudentConfig(model=student)}
    return lab_scene.config_of(data.parent, task=task, **models)


def scratch() -> ScratchModel:
    sizes = {**SIZE, "hidden_size": 4, "num_hidden_layers": 1}
    return ScratchModel(config={"model_type": "bert", **sizes})


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return model_folder(tmp_path / "teacher")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*WORDS, "<pad>"), r"8 of its 9 tokens have the .* run's 8, .*: <pad> \(8, none\); "),
        ((*WORDS[:-1], "movie"), r"7 of its 8 .* 8, .*: (film|movie) \((7, none|none, 7)\), "),
        # Tokens of two numbers tell more than a lone one.
        (("new", *WORDS), r"0 of its 9 .*: \[PAD\] \(1, 0\), \[UNK\] \(2, 1\), "),
    ],
    ids=["more words", "other words", "other numbers"],
)
def test_models_with_different_vocabularies_are_refused_unless_a_tokenizer_is_chosen(
    data, teacher, tmp_path, words, message
):
    student = model_folder(tmp_path / "student", words)

    with pytest.raises(TeacherError, match=rf"student\.model .*{message}.* set task\.tokenizer to"):
        prepare(config_of(data, teacher=teacher, student=student))

    for chosen, size in ((student, len(words)), (teacher, len(WORDS))):
        prepared = prepare(config_of(data, teacher=teacher, student=student, tokenizer=chosen))
        assert len(prepared.tokenizer) == size


def test_of_another_tokenizer_no_single_token_is_to_be_removed(data, tmp_path):
    """The tokenizer of the run has more tokens than the student's embedding has rows."""
    teacher = model_folder(tmp_path / "t", (*WORDS, "film-noir", "ious"))
    student = model_folder(tmp_path / "s", WORDS[:6], vocab_size=6)

    for tokenizer, message in (
        (
            None,
            r"^student\.model .* another tokenizer than the run: 6 of its 6 tokens have [^\n]*$",
        ),
        (teacher, r"^student\.model: .* 6 rows; .* numbers, or remove its tokens from 6 on$"),
    ):
        with pytest.raises(TeacherError, match=message) as refused:
            prepare(config_of(data, teacher=teacher, student=student, tokenizer=tokenizer))
        assert "remove ious" not in str(refused.value)


@pytest.mark.parametrize(
    ("role", "rows", "cure"),
    [
        ("teacher", (40, 41), "remove far"),
        ("student", (41, 40), r"raise student\.model\.config\.vocab_size"),
        ("", (64, None), ""),
    ],
)
def test_every_number_of_a_token_has_a_row(data, tmp_path, role, rows, cure):
    """Models of one vocabulary may have embeddings of different sizes."""
    teacher = model_folder(tmp_path / "t", vocab_size=rows[0])
    file = Path(teacher) / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["vocab"]["far"] = 40  # far behind the last word
    file.write_text(json.dumps(tree))
    own = {"vocab_size": rows[1]} if rows[1] else {}
    config = config_of(
        data, teacher=teacher, student=ScratchModel(config={**scratch().config, **own})
    )
    if not role:
        assert prepare(config).sources["student"].config.vocab_size == 41
        return
    message = rf"^{role}\.model: the token far .* number 40, .* 40 rows; .*, or {cure}$"
    with pytest.raises(TeacherError, match=message):
        prepare(config)


@pytest.mark.parametrize("finetune", [None, FinetuneOverrides()], ids=["given", "finetuned"])
def test_weights_without_a_tokenizer_are_refused_before_rows_are_read_unless_one_is_chosen(
    data, teacher, tmp_path, finetune
):
    """They take neither a tokenizer that is trained on the rows nor that of another model."""
    for file in Path(teacher).glob("tokenizer*"):
        file.unlink()
    spec = TeacherConfig(model=teacher, finetune=finetune)
    other = model_folder(tmp_path / "student", num_hidden_layers=1, vocab_size=64)
    message = r"teacher\.model: .*teacher has weights and no .*set task\.tokenizer to"

    config = config_of(data, teacher=teacher, student=other, tokenizer=other)
    assert len(prepare(dataclasses.replace(config, teacher=spec)).tokenizer) == len(WORDS)
    (data / "train.tsv").unlink()
    for student in (scratch(), other):
        config = config_of(data, teacher=teacher, student=student)
        with pytest.raises(TeacherError, match=message):
            prepare(dataclasses.replace(config, teacher=spec))


def test_a_tokenizer_trained_on_the_text_does_not_replace_the_teachers_own(data, tmp_path):
    teacher = model_folder(tmp_path / "teacher", vocab_size=400)
    config = config_of(data, teacher=teacher, student=scratch())
    recipe = TokenizerConfig(type="wordpiece", vocab_size=300)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, tokenizer=recipe))

    with pytest.raises(TeacherError, match=r"another tokenizer than the run: 5 of its 8"):
        prepare(config)


def test_a_named_tokenizer_whose_numbers_differ_from_a_models_own_is_told(
    data, teacher, tmp_path, caplog
):
    named = model_folder(tmp_path / "named", (*WORDS[:-2], WORDS[-1], WORDS[-2], "more"))

    prepare(config_of(data, teacher=teacher, student=scratch(), tokenizer=named))

    assert "teacher.model: 2 of the 8 tokens of the model's own tokenizer" in caplog.text
