"""Checks of conversations before a run: templates and end tokens of teacher and student."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from chat_runs import END, OTHER, config_of, model
from tiny_runs import write_jsonl

from megakd.engine import distributed
from megakd.errors import ConfigError, DataError
from megakd.inputs.inputs import prepare


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank without a process group."""
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 1)


def test_models_that_agree_are_silent(tmp_path, caplog):
    for role in ("teacher", "student"):
        model(tmp_path / role)

    prepare(config_of(tmp_path))

    assert not [r for r in caplog.records if "tokenizer_checks" in r.name]


def test_every_difference_is_one_line_with_the_choice(tmp_path, caplog):
    model(tmp_path / "teacher", family="qwen3", rows=352)
    model(tmp_path / "student", ends=[END, OTHER])
    caplog.set_level(logging.WARNING)

    prepare(config_of(tmp_path))

    lines = [r.getMessage() for r in caplog.records if r.name.endswith("tokenizer_checks")]
    assert len(lines) == 3
    for line, words in zip(
        lines,
        (
            ("template", "task.chat_template"),
            ("end tokens", OTHER),
            ("352 and 340", "soft targets"),
        ),
        strict=True,
    ):
        assert "teacher.model and student.model" in line
        assert all(word in line for word in words)


def test_a_teacher_with_another_end_token_is_refused_unless_accepted(tmp_path, caplog):
    model(tmp_path / "teacher", end=END)
    model(tmp_path / "student", end=OTHER)

    with pytest.raises(ConfigError) as caught:
        prepare(config_of(tmp_path))
    for words in ("teacher.model", END, OTHER, "task.end_tokens: accept"):
        assert words in str(caught.value)

    prepare(config_of(tmp_path, end_tokens="accept"))
    assert "would not stop" in caplog.text


def test_a_student_that_also_ends_with_the_teachers_token_is_fine(tmp_path):
    model(tmp_path / "teacher", end=END)
    model(tmp_path / "student", end=OTHER, ends=[OTHER, END])

    prepare(config_of(tmp_path))


def test_answers_without_an_end_token_of_the_student_are_refused_unless_accepted(tmp_path, caplog):
    """The template ends answers with a token that ends nothing."""
    for role in ("teacher", "student"):
        model(tmp_path / role, end=OTHER)

    with pytest.raises(ConfigError) as caught:
        prepare(config_of(tmp_path))
    for words in (OTHER, END, "eos_token_id", "task.end_tokens: accept"):
        assert words in str(caught.value)

    prepare(config_of(tmp_path, end_tokens="accept"))
    assert "accepted by task.end_tokens" in caplog.text


def test_a_tokenizer_without_an_end_token_is_named_as_the_cause(tmp_path):
    for role in ("teacher", "student"):
        folder = Path(model(tmp_path / role))
        settings = folder / "tokenizer_config.json"
        tree = json.loads(settings.read_text(encoding="utf-8"))
        settings.write_text(json.dumps({**tree, "eos_token": None}), encoding="utf-8")
        (folder / "generation_config.json").unlink()

    with pytest.raises(ConfigError, match="the tokenizer has no eos_token") as caught:
        prepare(config_of(tmp_path))

    assert f"the special tokens that count are {END}" in str(caught.value)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"prompt": "Hi"}, ("training rows", "rollout")),
        ({"prompt": "Hi", "completion": "Hello"}, ("training rows", "task.completion_column")),
    ],
)
def test_prompts_alone_teach_nothing_without_rollouts(tmp_path, held, words):
    for role in ("teacher", "student"):
        model(tmp_path / role)
    own = {"dataset": None, "train_files": str(tmp_path / "prompts.jsonl")}
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Question {n}"} for n in range(4)])
    write_jsonl(tmp_path / "held.jsonl", [held])

    with pytest.raises(DataError) as caught:
        prepare(config_of(tmp_path, **own, validation_files=str(tmp_path / "held.jsonl")))

    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("is_set", [False, True])
def test_prompts_alone_cannot_be_scored(tmp_path, is_set):
    for role in ("teacher", "student"):
        model(tmp_path / role)
    write_jsonl(tmp_path / "held.jsonl", [{"prompt": "Hi"}])
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "Hi", "completion": "Hello"}])
    train, held = str(tmp_path / "train.jsonl"), str(tmp_path / "held.jsonl")
    own: dict[str, Any] = {"train_files": train, "validation_files": held}
    if is_set:
        write_jsonl(tmp_path / "good.jsonl", [{"prompt": "Hi", "completion": "Hey"}])
        own |= {"validation_files": str(tmp_path / "good.jsonl"), "evaluation_sets": {"own": held}}

    with pytest.raises(DataError, match=r"evaluation_sets\.own" if is_set else "validation_files"):
        prepare(config_of(tmp_path, dataset=None, **own))


def test_documents_are_not_compared(tmp_path, caplog):
    model(tmp_path / "teacher", family="qwen3")
    model(tmp_path / "student", ends=[END, OTHER])
    config = config_of(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {n} and more"} for n in range(30)])

    prepare(config)

    assert not [r for r in caplog.records if "tokenizer_checks" in r.name]
