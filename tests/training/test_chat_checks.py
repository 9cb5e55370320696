"""Checks of conversations before a run: templates and end tokens of teacher and student."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from chat_runs import END, OTHER, config_of, model
from tiny_runs import write_jsonl

from megakd.errors import ConfigError, DataError
from megakd.inputs.inputs import prepare

PROMPT, ANSWERED = {"prompt": "Hi"}, {"prompt": "Hi", "completion": "Hello"}


@pytest.fixture
def both(tmp_path) -> list[Path]:
    return [Path(model(tmp_path / role)) for role in ("teacher", "student")]


@pytest.mark.usefixtures("both")
def test_models_that_agree_are_silent(tmp_path, caplog):
    prepare(config_of(tmp_path))

    assert not [r for r in caplog.records if "tokenizer_checks" in r.name]


def test_every_difference_is_one_line_with_the_choice(tmp_path, caplog):
    model(tmp_path / "teacher", family="qwen3", rows=352)
    model(tmp_path / "student", ends=[END, OTHER])
    caplog.set_level(logging.WARNING)

    prepare(config_of(tmp_path))

    wanted = (
        ("template", "task.chat_template"),
        ("end tokens", OTHER),
        ("352 and 340", "soft targets"),
    )
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("tokenizer_checks")]
    for line, words in zip(lines, wanted, strict=True):
        assert all(word in line for word in ("teacher.model and student.model", *words))


@pytest.mark.parametrize(
    ("end", "named", "accepted"),
    [
        (END, ("teacher.model", END, OTHER), "would not stop"),
        # The template ends answers with a token that ends nothing.
        (OTHER, (OTHER, END, "eos_token_id"), "accepted by task.end_tokens"),
    ],
    ids=["of the teacher", "of the template"],
)
def test_an_end_token_that_the_student_lacks_is_refused_unless_accepted(
    tmp_path, caplog, end, named, accepted
):
    model(tmp_path / "teacher", end=end)
    model(tmp_path / "student", end=OTHER)

    with pytest.raises(ConfigError) as caught:
        prepare(config_of(tmp_path))
    for words in (*named, "task.end_tokens: accept"):
        assert words in str(caught.value)

    prepare(config_of(tmp_path, end_tokens="accept"))
    assert accepted in caplog.text


def test_a_student_that_also_ends_with_the_teachers_token_is_fine(tmp_path):
    model(tmp_path / "teacher", end=END)
    model(tmp_path / "student", end=OTHER, ends=[OTHER, END])

    prepare(config_of(tmp_path))


def test_a_tokenizer_without_an_end_token_is_named_as_the_cause(tmp_path, both):
    for folder in both:
        settings = folder / "tokenizer_config.json"
        tree = json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(json.dumps({**tree, "eos_token": None}), encoding="utf-8")
        (folder / "generation_config.json").unlink()

    with pytest.raises(ConfigError, match="the tokenizer has no eos_token") as caught:
        prepare(config_of(tmp_path))

    assert f"the special tokens that count are {END}" in str(caught.value)


@pytest.mark.parametrize(
    ("train", "held", "more", "words"),
    [
        (PROMPT, PROMPT, None, ("training rows", "rollout")),
        (PROMPT, ANSWERED, None, ("training rows", "task.completion_column")),
        (ANSWERED, PROMPT, None, ("validation_files",)),
        (ANSWERED, ANSWERED, PROMPT, ("evaluation_sets.more",)),
    ],
)
@pytest.mark.usefixtures("both")
def test_prompts_alone_teach_nothing_without_rollouts_and_cannot_be_scored(
    tmp_path, train, held, more, words
):
    rows = [{**train, "prompt": f"Question {n}"} for n in range(4)]
    files: dict[str, Any] = {
        "train_files": str(write_jsonl(tmp_path / "train.jsonl", rows)),
        "validation_files": str(write_jsonl(tmp_path / "held.jsonl", [held])),
    }
    if more:
        files["evaluation_sets"] = {"more": str(write_jsonl(tmp_path / "more.jsonl", [more]))}

    with pytest.raises(DataError) as caught:
        prepare(config_of(tmp_path, dataset=None, **files))

    assert all(word in str(caught.value) for word in words)


def test_documents_are_not_compared(tmp_path, caplog):
    model(tmp_path / "teacher", family="qwen3")
    model(tmp_path / "student", ends=[END, OTHER])
    config = config_of(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {n} and more"} for n in range(30)])

    prepare(config)

    assert not [r for r in caplog.records if "tokenizer_checks" in r.name]
