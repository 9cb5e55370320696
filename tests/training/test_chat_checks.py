"""Conversations before a run: templates and end tokens of the models, and the length of rows."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from chat_runs import END, OTHER, config_of, model
from chat_tokenizers import asked, chat_tokenizer
from tiny_runs import bert, config_tree, write_jsonl

from megakd.commands.plan import plan_of
from megakd.config.file import config_of as checked
from megakd.config.run import RunConfig
from megakd.config.sections import RolloutConfig
from megakd.config.task import MixtureSource
from megakd.errors import ConfigError, DataError
from megakd.training.inputs import RunInputs, prepare

PROMPT, ANSWERED = {"prompt": "Hi"}, {"prompt": "Hi", "completion": "Hello"}


@pytest.fixture
def both(tmp_path) -> list[Path]:
    return [Path(model(tmp_path / role)) for role in ("teacher", "student")]


def test_other_templates_of_models_that_read_conversations_are_one_line(tmp_path, caplog):
    """A student that also ends with the teacher's token is fine, and documents have no turns."""
    model(tmp_path / "teacher", family="qwen3", rows=352)
    model(tmp_path / "student", end=OTHER, ends=[END, OTHER])
    config = config_of(tmp_path)

    prepare(config)

    (line,) = compared(caplog)
    words = "chat templates of teacher.model and student.model", "task.chat_template"
    assert all(word in line for word in words)
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


# The length of rows: measured where the config gives none, and told where rows are cut.


def tokens(*messages: str) -> int:
    tokenizer: Any = chat_tokenizer("chatml")
    text = tokenizer.apply_chat_template(asked(*messages), tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def run_of(folder: Path, rows: list[dict[str, Any]], **task: Any) -> RunConfig:
    """A run of two Llamas on rows, with a row apart for validation."""
    for role in ("teacher", "student"):
        model(folder / role)
    train, held = write_jsonl(folder / "train.jsonl", rows), folder / "held.jsonl"
    write_jsonl(held, rows[:4])
    files = {"train_files": str(train), "validation_files": str(held)}
    return config_of(folder, **{"dataset": None, "max_length": None, **files, **task})


def chats(*lengths: int) -> list[dict[str, Any]]:
    return [{"messages": asked("Q", "x" * length)} for length in lengths]


def longest(prepared: RunInputs) -> int:
    return max(len(row["input_ids"]) for row in prepared.encoded.train)  # type: ignore[call-overload]


def test_a_length_that_is_not_set_keeps_99_percent_of_the_conversations(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = run_of(tmp_path, chats(*[1] * 60, *[40] * 138, 200, 300))

    prepared = prepare(config)

    kept = tokens("Q", "x" * 40)
    assert kept <= prepared.config.task.row_length == -(-kept // 8) * 8 == longest(prepared)
    p50, whole = tokens("Q", "x" * 40), tokens("Q", "x" * 300)
    assert f"p50 {p50}, p95 {p50}, p99 {p50}, longest {whole} tokens" in caplog.text
    assert f"the longest has {whole} tokens, 2 are truncated, 0 dropped" in caplog.text
    assert "keeps 99 % whole" not in caplog.text


def test_the_length_is_at_most_the_context_of_every_model(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = run_of(tmp_path, chats(*[1] * 10, *[200] * 10))
    settings = tmp_path / "teacher/config.json"
    context = {"max_position_embeddings": 100}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | context))

    prepared = prepare(config)

    assert prepared.config.task.row_length == longest(prepared) == 100
    assert "task.max_length: 100 (not set; the context of teacher.model)" in caplog.text
    assert f"task.max_length={tokens('Q', 'x' * 200)} keeps 99 % whole" in caplog.text


def test_a_shorter_length_is_told_with_the_rows_that_it_cuts(tmp_path, caplog):
    prepare(run_of(tmp_path, chats(*[1] * 60, *[60] * 40), max_length=64))

    told = "train: 40 of 100 rows are longer than task.max_length; task.max_length={} keeps 99 % wh"
    assert told.format(tokens("Q", "x" * 60)) in caplog.text


def test_documents_are_packed_to_1024_tokens_or_to_the_length_of_long_documents(tmp_path):
    short, long = [{"text": "a"}] * 200, [{"text": "ab" * 800}] * 20

    lengths = [
        prepare(run_of(tmp_path / name, rows)).config.task.row_length
        for name, rows in {"short": short, "long": long}.items()
    ]

    assert lengths == [1024, 1608]  # two characters are two tokens, and an end token follows
    source = MixtureSource(files=str(write_jsonl(tmp_path / "a.jsonl", short)), weight=1.0)
    mixture = {"mixture": {"a": source}, "train_files": None}
    config = run_of(tmp_path / "mixture", short, **mixture)
    assert prepare(config).config.task.row_length == 1024


def test_the_held_out_rows_measure_a_stream(tmp_path):
    config = run_of(tmp_path, chats(*[40] * 8))
    stream = dataclasses.replace(config.task, streaming=True)
    train = dataclasses.replace(config.train, max_steps=2)

    prepared = prepare(dataclasses.replace(config, task=stream, train=train))

    assert prepared.config.task.row_length == -(-tokens("Q", "x" * 40) // 8) * 8


def test_generated_texts_have_room_behind_the_prompts(tmp_path):
    held = write_jsonl(tmp_path / "held_out.jsonl", [{"prompt": "a", "completion": "b"}])
    config = run_of(tmp_path, [{"prompt": "p" * 30}] * 20, validation_files=str(held))
    rollout = RolloutConfig(max_new_tokens=100)

    prepared = prepare(dataclasses.replace(config, rollout=rollout))

    assert prepared.config.task.row_length == 136  # 30 + 100, as a multiple of 8


def test_texts_with_labels_keep_128_tokens_and_tell_the_rows_that_are_cut(tmp_path, caplog):
    rows = [
        {"text": f"{word} " * (300 if word > 60 else 2), "label": ("no", "yes")[word % 2]}
        for word in range(100)
    ]
    data = str(write_jsonl(tmp_path / "train.jsonl", rows))
    task = {"type": "classification", "dataset": data, "max_length": None}
    student = {"model": bert(1, max_position_embeddings=512)}

    prepared = prepare(checked(config_tree(tmp_path / "run", task, student=student)))

    assert prepared.config.task.max_length == longest(prepared) == 128
    assert "% of the rows are cut at task.max_length 128" in caplog.text
    assert "task.max_length=302 keeps 99 %" in caplog.text


def test_a_plan_asks_for_the_length_that_it_cannot_measure(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.max_length: missing, and a plan reads no data"):
        plan_of(run_of(tmp_path, chats(1)), {})
