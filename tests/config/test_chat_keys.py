"""The keys of conversations and mixtures: what contradicts what."""

from __future__ import annotations

import pytest
from run_files import message_of

from megakd.config.file import load_config

CHAT = ("task.type=causal_lm", "objective=[{loss: soft_target_kl}]")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("task.train_on=last",), ("task.train_on", "causal_lm", "classification")),
        (("task.mixture={a: {files: a.jsonl, weight: 1}}",), ("task.mixture", "causal_lm")),
        (
            (*CHAT, "task.dataset=x", "task.text_columns=[a]", "task.messages_column=b"),
            ("task.messages_column", "task.text_columns"),
        ),
        (
            (*CHAT, "task.dataset=x", "task.messages_column=a", "task.prompt_column=b"),
            ("task.prompt_column", "task.messages_column"),
        ),
        (
            (*CHAT, "task.dataset=x", "task.completion_column=a"),
            ("task.prompt_column", "task.completion_column"),
        ),
        (
            (*CHAT, "task.dataset=x", "task.chat_template=nowhere.jinja"),
            ("task.chat_template", "nowhere.jinja"),
        ),
        (
            (*CHAT, "task.dataset=x", "task.mixture={a: {files: a.jsonl, weight: 1}}"),
            ("task.mixture", "task.dataset"),
        ),
        (
            (*CHAT, "task.dataset=null", "task.mixture={a: {files: a.jsonl, weight: 0}}"),
            ("task.mixture.a.weight", "0"),
        ),
        ((*CHAT, "task.dataset=null", "task.mixture={}"), ("task.mixture", "source")),
        (
            (*CHAT, "task.dataset=null", "task.mixture={train: {files: a.jsonl, weight: 1}}"),
            ("a source of a mixture", "'train'"),
        ),
    ],
)
def test_keys_that_cannot_be_meant_are_refused(run_file, overrides, words):
    message = message_of(run_file, *overrides)

    for word in words:
        assert word in message


def test_a_mixture_replaces_the_data_set(run_file):
    mixture = "task.mixture={a: {files: a.jsonl, weight: 1}, b: {files: [b.jsonl], weight: 0.5}}"

    task = load_config(run_file, (*CHAT, "task.dataset=null", mixture)).task

    assert task.mixture
    assert [part.weight for part in task.mixture.values()] == [1, 0.5]
    assert task.data_name == "a, b"
