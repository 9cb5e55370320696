"""Checks of conversations before a run: templates and end tokens of teacher and student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chat_runs import END, OTHER, config_of, model
from tiny_runs import write_jsonl

from megakd.errors import ConfigError, DataError
from megakd.inputs.inputs import prepare

PROMPT, ANSWERED = {"prompt": "Hi"}, {"prompt": "Hi", "completion": "Hello"}


@pytest.fixture
def both(tmp_path) -> list[Path]:
    return [Path(model(tmp_path / role)) for role in ("teacher", "student")]


def test_every_difference_of_models_that_read_conversations_is_one_line(tmp_path, caplog):
    """A student that also ends with the teacher's token is fine, and documents have no turns."""
    model(tmp_path / "teacher", family="qwen3", rows=352)
    model(tmp_path / "student", end=OTHER, ends=[END, OTHER])
    config = config_of(tmp_path)

    prepare(config)

    differences = ("template", "task.chat_template"), ("end tokens", OTHER), ("352 and 340", "soft")
    for line, words in zip(compared(caplog), differences, strict=True):
        assert all(word in line for word in ("teacher.model and student.model", *words))
    caplog.clear()
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"text {n} and more"} for n in range(30)])
    prepare(config)
    assert compared(caplog) == []


def compared(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.endswith("tokenizer_checks")]


@pytest.mark.usefixtures("both")
def test_models_that_agree_are_silent(tmp_path, caplog):
    prepare(config_of(tmp_path))

    assert compared(caplog) == []


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
        (PROMPT, ANSWERED, ANSWERED, ("training rows", "rollout", "task.completion_column")),
        (ANSWERED, PROMPT, ANSWERED, ("validation_files",)),
        (ANSWERED, ANSWERED, PROMPT, ("evaluation_sets.more",)),
    ],
)
@pytest.mark.usefixtures("both")
def test_prompts_alone_teach_nothing_without_rollouts_and_cannot_be_scored(
    tmp_path, train, held, more, words
):
    rows = {"train": [{**train, "prompt": f"Question {n}"} for n in range(4)]}
    rows |= {"held": [held], "more": [more]}
    files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows[name])) for name in rows}
    sets = {"evaluation_sets": {"more": files["more"]}, "validation_files": files["held"]}

    with pytest.raises(DataError) as caught:
        prepare(config_of(tmp_path, dataset=None, train_files=files["train"], **sets))

    assert all(word in str(caught.value) for word in words)
