"""Mistakes that people made with earlier versions: one line each, before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_runs import model
from spoiling import LATE, assert_refused

GOOD = "text,label\n" + "good film,good\nbad film,bad\n" * 8
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


# What lies in the data's files by name, overrides of a classifier's run, words of the message.
OF_CLASSES: dict[str, tuple[dict[str, str | bytes], str, tuple[str, ...]]] = {
    "the text has another column": (
        {"train.csv": "body,label\na,b\n"},
        "",
        ("train.csv: column 'text' does not exist", "body, label", "task.text_column"),
    ),
    "the label has another column": (
        {"train.csv": "text,topic\na,b\n"},
        "",
        ("column 'label'", "does not exist; the columns are text, topic"),
    ),
    "the label's column is misspelt": (
        {"train.csv": GOOD},
        "task.label_column=labl",
        ("column 'labl' (task.label_column) does not exist",),
    ),
    "scores among the classes": (
        {"train.jsonl": lines({"text": "a", "label": 0.5}, {"text": "b", "label": 1})},
        "",
        ("label 0.5", "is not a class", "regression"),
    ),
    "a score that is no number": (
        {"train.csv": "text,label\na,0.5\nb,much\n"},
        "task.type=regression",
        ("line 3: 'much'", "is not a finite"),
    ),
    "scores that are not there": (
        {"train.csv": "text,label\na,nan\nb,nan\n"},
        "task.type=regression",
        ("no validation split", "at least one label"),
    ),
    "numbers and words as labels": (
        {"train.csv": "text,label\na,0\nb,cat\n"},
        "",
        ("mix numbers and words: '0'", "'cat'"),
    ),
    "one class": ({"train.csv": "text,label\na,x\nb,x\n"}, "", ("all labels", "are 'x'")),
    "no label": ({"train.csv": "text,label\na,\nb,\n"}, "", ("has no label in any row",)),
    "a class that training does not have": (
        {"train.csv": GOOD, "validation.csv": "text,label\na,god\n"},
        "",
        ("validation.csv, line 2: label 'god' is not one of the 2", "did you mean"),
    ),
    "semicolons": ({"train.csv": "text;label\na;b\n"}, "", ("train.csv", "text;label")),
    "a line for Excel": ({"train.csv": "sep=,\ntext,label\na,b\n"}, "", ("sep= is a line for Ex",)),
    "UTF-16": ({"train.csv": GOOD.encode("utf-16-le")}, "", ("is UTF-16", "convert the file")),
    "an empty file": ({"train.csv": ""}, "", ("train.csv",)),
    "a header alone": ({"train.csv": "text,label\n"}, "", ("train.csv",)),
    "a broken line": ({"train.jsonl": '{"text": "a", "label": 0}\n{"text": '}, "", ("line 2",)),
    "a page in place of data": ({"train.jsonl": "<!DOCTYPE html>\n<html>"}, "", ("line 1",)),
    "a list of rows named as lines": (
        {"train.jsonl": '[{"text": "a", "label": 0}]'},
        "",
        ("line 1 is not a JSON object",),
    ),
    "lines named as a list": ({"train.json": lines({"text": "a"}, {})}, "", ("is named .jsonl",)),
    "half a parquet file": ({"train.parquet": "PAR1"}, "", ("is not a readable parquet file",)),
    "a file that is not there": (
        {},
        "task.train_files=[none.csv]",
        ("none.csv", "task.train_files"),
    ),
    "a folder without data": (
        {"notes.md": "a"},
        "",
        ("train.* does not exist", "the folder holds: notes.md"),
    ),
    "lists beside words": (
        {"train.jsonl": lines({"text": "a", "label": ["x"]}, {"text": "b", "label": "y"})},
        "",
        ("line 2", "label"),
    ),
    "soft labels that are no probabilities": (
        {
            "train.jsonl": lines(
                *({"text": f"a{n}", "label": n % 2, "p": [0.9, n / 90]} for n in range(9, 11))
            )
        },
        "task.soft_labels=p; teacher=null",
        ("line 2: soft labels", "sum to"),
    ),
    "a misspelt key": (
        {"train.csv": GOOD},
        "train.learning_rat=1",
        ('did you mean "learning_rate"',),
    ),
    "a rate in quotation marks": (
        {"train.csv": GOOD},
        "train.learning_rate='2e-5'",
        ('train.learning_rate: must be a valid number (got "2e-5")',),
    ),
    "a word for a number": ({"train.csv": GOOD}, "train.max_steps=many", ('(got "many")',)),
    "a negative rate": (
        {"train.csv": GOOD},
        "train.learning_rate=-1",
        ("train.learning_rate", "-1"),
    ),
    "the name of another library": ({"train.csv": GOOD}, "lora_r=8", ("lora_r", "student.lora")),
    "an unknown method": (
        {"train.csv": GOOD},
        "method.name=minidisk",
        ('did you mean "minidisc"',),
    ),
    "an unknown loss": (
        {"train.csv": GOOD},
        "objective=[{loss: soft_target_k}]",
        ('did you mean "soft_target_kl"',),
    ),
    "a metric of another task": ({"train.csv": GOOD}, "eval.metrics=[rouge]", ("rouge",)),
    "a variable that is not set": (
        {"train.csv": GOOD},
        "task.dataset=$NOT_SET_HERE/data",
        ("NOT_SET_HERE",),
    ),
    "more tokens than the model has": ({"train.csv": GOOD}, "task.max_length=99", ("at most 32",)),
    "two kinds of half precision": (
        {"train.csv": GOOD},
        "train.bf16=true; train.fp16=true",
        ("bf16", "fp16"),
    ),
    "a teacher that is not there": ({"train.csv": GOOD}, "teacher.model=./gone", ("gone",)),
    "an unknown ZeRO stage": (
        {"train.csv": GOOD},
        "student.deepspeed={zero_optimization:{stage:4}}",
        ("student.deepspeed", "4"),
    ),
}


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("case", OF_CLASSES)
def test_a_mistake_with_a_classifier_gets_one_line(bench, case):
    files, overrides, fragments = OF_CLASSES[case]
    data = write_files(bench.folder / "data", files)

    tree = bench.tree({"dataset": str(data)}, teacher=LATE)
    outcome = bench.start(tree, *filter(None, overrides.split("; ")))

    assert_refused(outcome, bench, *fragments)


# The first of ten rows, overrides of a chat model's run, words of the message.
OF_CHATS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "no answer to learn": ({"messages": TURNS[:1]}, "", ("no message of role 'assistant'",)),
    "messages that are a text": ({"messages": "a"}, "", ("line 1", "must be a list of messages")),
    "a role of another format": (
        {"messages": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
        "",
        ("message 2: from is 'bot'", "gpt"),
    ),
    "a turn without content": (
        {"messages": [{"role": "user"}, TURNS[1]]},
        "",
        ("message 1: the message of role 'user' has no content",),
    ),
    "a split that a folder lacks": (
        {"messages": TURNS},
        "task.splits={train: a}",
        ('cannot be loaded: Unknown split "a"', "one of ['train']"),
    ),
    "another vocabulary": (
        {"messages": TURNS},
        "student.model={config: {model_type: llama, hidden_size: 8, num_attention_heads: 2, "
        "vocab_size: 10}}",
        ("of the model has 10",),
    ),
}


@pytest.mark.parametrize("case", OF_CHATS)
def test_a_mistake_with_a_chat_model_gets_one_line(bench, case):
    row, overrides, fragments = OF_CHATS[case]
    questions = ({"role": "user", "content": f"a {number}"} for number in range(9))
    rows = [row, *({"messages": [question, TURNS[1]]} for question in questions)]
    data = write_files(bench.folder / "data", {"train.jsonl": lines(*rows)})
    teacher = {"model": model(bench.folder / "teacher")}
    task = {"type": "causal_lm", "dataset": str(data)}

    tree = bench.tree(task, teacher=teacher, student=teacher)
    outcome = bench.start(tree, *filter(None, overrides.split("; ")))

    assert_refused(outcome, bench, *fragments)
