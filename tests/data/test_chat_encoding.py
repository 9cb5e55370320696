"""Encoded conversations: numbers, the table at the start, cutting and keys."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from chat_tokenizers import asked, chat_tokenizer, template_of
from tiny_runs import write_jsonl

from megakd.config.task import TaskConfig
from megakd.data import chat_tokens, encoding
from megakd.data.chat_tokens import ChatCounts, ChatEncoder, learned_ends
from megakd.data.encoding import Encoded, encode_splits
from megakd.data.records import BadRows
from megakd.data.splits import Splits, load_splits
from megakd.data.tokenizers import load_tokenizer, training_texts
from megakd.errors import DataError


class Data:
    """Conversations on disk and how a run reads them."""

    def __init__(self, folder: Path, rows: list[Any], *, family: str = "chatml", **keys: Any):
        self.folder = folder
        self.tokenizer = chat_tokenizer(family, merges=False)
        train = str(write_jsonl(folder / "train.jsonl", rows))
        held = str(write_jsonl(folder / "held.jsonl", chats(("Hi", "Hello"))))
        usual = {"type": "causal_lm", "max_length": 64, "train_files": train}
        self.task = TaskConfig(**{**usual, "validation_files": held, **keys})

    @property
    def splits(self) -> Splits:
        return load_splits(self.task, seed=0, cache_dir=self.folder / "cache")

    def encoded(self) -> Encoded:
        cache = self.folder / "cache"
        return encode_splits(self.splits, self.tokenizer, self.task, cache_dir=cache)

    def counts(self) -> ChatCounts:
        return self.encoded().chat["train"]


def chats(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"messages": asked(*turn)} for turn in turns]


# The prompt of a conversation: <|im_start|>user\n….<|im_end|>\n<|im_start|>assistant\n
FRAME = len("user\n\nassistant\n") + 3


def test_tokens_targets_truncated_and_dropped_rows_are_counted_and_told(tmp_path, caplog):
    rows = chats(("Hi", "abc"), ("Hi", "x" * 60), ("y" * 60, "abc"))
    data = Data(tmp_path, [*rows, *chats(("Hi", ""))])

    caplog.set_level(logging.INFO)
    counts = data.counts()

    prompt = FRAME + 2
    assert counts == ChatCounts(
        rows=4,
        kept=3,
        tokens=(prompt + 4 + 1) + 64 + (prompt + 1 + 1),
        targets=4 + (64 - prompt) + 1,
        truncated=1,
        long_prompt=1,
        special={data.tokenizer.eos_token_id: 2},
        ends={data.tokenizer.eos_token_id: 2},
        lengths=dict.fromkeys((prompt + 5, prompt + 62, FRAME + 60 + 5, prompt + 2), 1),
    )
    assert (
        f"train: 4 conversations, 3 encoded rows with {counts.tokens} tokens, of which "
        f"{100 * counts.targets / counts.tokens:.1f} % count; the longest has {FRAME + 65} tokens, "
        "1 are truncated, 1 dropped"
    ) in caplog.text
    assert "train: 1 of 4 rows are left out: the prompt of 1 fills task.max_length, " in caplog.text
    assert f"task.max_length={FRAME + 65} keeps 99 % whole" in caplog.text
    dropped = Data(tmp_path, rows[:2], truncation="drop").counts()
    assert (dropped.kept, dropped.too_long, dropped.truncated) == (1, 1, 0)


def test_answers_end_with_the_last_token_of_a_conversation_and_not_with_others_that_count(tmp_path):
    data = Data(tmp_path, chats(("Hi", "abc", "More", "def")), family="phi3")
    end, of_turns = data.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])

    counts = data.counts()

    assert (counts.special, counts.ends) == ({end: 1, of_turns: 2}, {end: 1})


@pytest.mark.parametrize(
    ("counts", "ends"),
    [
        ({"train": ChatCounts(kept=20, ends={5: 18, 7: 1}), "validation": ChatCounts()}, {5}),
        ({f"train/{n}": ChatCounts(kept=4, ends={n: 4}) for n in (5, 6)}, {5, 6}),
        ({"train": ChatCounts(kept=90, prompts=30, truncated=50, ends={5: 1, 6: 9})}, {5, 6}),
        ({"validation": ChatCounts(kept=4, ends={5: 4}), "sets/a": ChatCounts(ends={6: 9})}, {5}),
        (None, set()),
    ],
)
def test_learned_answers_end_with_the_tokens_that_end_a_tenth_of_them(counts, ends):
    assert learned_ends(counts) == ends


@pytest.mark.parametrize("more", [0, 1])
def test_a_prompt_that_fills_the_row_is_not_the_prompt_of_the_row(tmp_path, more):
    messages = asked("Hi", "Hello", "Bye", "See you")
    data = Data(tmp_path, [{"messages": messages}])
    prompts = [
        data.tokenizer.apply_chat_template(messages[:n], add_generation_prompt=True)["input_ids"]
        for n in (1, 3)
    ]
    data.task = dataclasses.replace(data.task, max_length=len(prompts[1]) + more)

    assert data.encoded().train[0]["prompt_length"] == len(prompts[more])
    long = chats(("y" * 60, "a"), ("z" * 60, "b"))
    with pytest.raises(DataError, match=r"is 64\): the prompt of 2 fills task\.max_length"):
        Data(tmp_path / "long", long).encoded()


def test_a_second_start_tells_the_same_without_encoding(tmp_path, caplog, monkeypatch):
    data = Data(tmp_path, chats(("Hi", "abc"), ("Hi", "x" * 60)))
    caplog.set_level(logging.INFO, logger="megakd.data.chat_tokens")

    data.encoded()
    first = [*caplog.messages]
    caplog.clear()
    monkeypatch.setattr(encoding, "tables_of_conversations", None)
    data.encoded()

    assert caplog.messages == first
    assert first[0].startswith("train: 2 conversations")
    assert any("[[abc<|im_end|>]]" in line for line in first)


def test_the_template_and_every_setting_of_the_rendering_change_the_key(tmp_path):
    settings: list[dict[str, Any]] = [
        {},
        {"chat_template_kwargs": {"enable_thinking": False}},
        *({"reasoning": "strip"}, {"train_on": "last"}, {"truncation": "drop"}),
        {"family": "qwen3"},
    ]

    trains = [Data(tmp_path, chats(("Hi", "abc")), **keys).encoded().train for keys in settings]

    assert len({rows.cache_files[0]["filename"] for rows in trains}) == len(settings)
    assert trains[0][0]["input_ids"] != trains[-1][0]["input_ids"]


def test_a_template_in_a_file_replaces_the_tokenizers_and_texts_train_a_tokenizer(tmp_path):
    data = Data(tmp_path, chats(("Hi", "abc"), ("Bye", "def")))
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "own.jinja").write_text(template_of("qwen3"), encoding="utf-8-sig")
    names = {"tokenizer": str(tmp_path / "tokenizer"), "chat_template": str(tmp_path / "own.jinja")}
    task = dataclasses.replace(data.task, **names)

    tokenizer = load_tokenizer(task, data.splits, model_folders=[], cache_dir=tmp_path / "cache")

    assert tokenizer.chat_template == template_of("qwen3")
    assert list(training_texts(data.splits)) == ["Hi\nabc", "Bye\ndef"]


def test_one_process_encodes_chats_beside_training_and_several_before(tmp_path, monkeypatch):
    used = Mock(side_effect=chat_tokens.in_processes)
    monkeypatch.setattr(chat_tokens, "in_processes", used)
    monkeypatch.setattr(
        chat_tokens, "processes_for", lambda count, each: min(3, count // each) or 1
    )
    monkeypatch.setattr(chat_tokens, "ROWS_OF_A_PROCESS", 2)
    data = Data(tmp_path, chats(*((f"Question {n}", "x" * 5 * n) for n in range(11))))

    data.encoded()
    encoder, rows = ChatEncoder(data.tokenizer, data.task, bad=BadRows()), data.splits.train
    tables = chat_tokens.tables_of_conversations(rows, encoder, counts={}, beside_training=True)

    assert sum(map(len, tables)) == len(rows)
    # The training rows, the one of the validation split, and those beside training.
    assert [call.args[-1] for call in used.call_args_list] == [3, 1, 1]


HEADER = "{{- '<|im_start|>assistant\\n"
# What is replaced in Qwen 3's template, its arguments, and how many rows have empty reasoning.
EMPTY: dict[str, tuple[tuple[str, str], dict[str, bool], int]] = {
    "in the answer": (("", ""), {}, 2),
    "in the prompt": (("", ""), {"enable_thinking": False}, 0),
    "begun in the prompt": ((f"{HEADER}' }}}}", f"{HEADER}<think>\\n' }}}}"), {}, 2),
}


@pytest.mark.parametrize(("change", "options", "count"), EMPTY.values(), ids=EMPTY)
def test_empty_reasoning_in_answers_is_counted_with_the_key_that_moves_it(
    tmp_path, caplog, change, options, count
):
    rows = chats(("Hi", "Hello"), ("Ho", "Hu"), ("Hi", "<think>\nHm.\n</think>\n\nHello"))
    rows = rows[:2] if options else rows  # which would contradict the third
    data = Data(tmp_path, rows, family="qwen3", chat_template_kwargs=options)
    data.tokenizer.chat_template = template_of("qwen3").replace(*change)

    assert data.counts().empty_reasoning == count
    line = "train: 2 of 3 rows get empty reasoning in their answers from the chat template, so that"
    assert (line in caplog.text) == ("{enable_thinking: false}" in caplog.text) == bool(count)


def test_rows_that_cannot_be_read_or_encoded_are_named_together(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(chat_tokens, "ROWS_OF_A_PROCESS", 2)
    good, unread = chats(("Hi", "abc"))[0], {"messages": [{"role": "user"}]}
    with pytest.raises(DataError, match="3 rows that cannot be used") as caught:
        Data(tmp_path, [good, unread, good, unread, unread]).encoded()
    assert str(caught.value).endswith("(3 such rows: line 2, line 4, line 5)")

    refused = [{"messages": asked("Hi", f"{n}", system="no place for this")} for n in range(30)]
    data = Data(tmp_path / "refused", [good, *refused], family="gemma")
    with pytest.raises(DataError, match="the first 20 rows that cannot be used") as caught:
        data.encoded()
    _, *lines = str(caught.value).splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= 370
    assert "line 2: the chat template refuses" in lines[0]
    assert lines[0].endswith(" (20 such rows: line 2, line 3, line 4 and 17 more)")

    data = Data(tmp_path / "refused", [good, *refused], family="gemma", bad_rows="drop")
    assert len(data.encoded().train) == 1
    assert caplog.text.count("a row is left out") == 3


def test_bad_rows_are_left_out_on_request_and_counted_at_every_start(tmp_path, caplog):
    bad = [{"messages": [{"role": "user"}]}, {"messages": asked("Hi", "y", system="refused")}]
    rows = [*bad, *chats(("Hi", "abc"), ("Ho", "abd"))]

    for _ in range(2):
        caplog.clear()
        data = Data(tmp_path, rows, family="gemma", bad_rows="drop")
        with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"messages": \n')
        counts = data.counts()
        assert "2 bad row(s) left out (task.bad_rows: drop)" in caplog.text
        assert (counts.rows, counts.kept, counts.bad) == (3, 2, 1)
        assert "1 of 3 rows are left out: " in caplog.text
        assert "in 0 no token counts, 1 cannot be encoded" in caplog.text
    # Rows that were left out are not taken for a run that refuses them.
    with pytest.raises(DataError, match="line 1"):
        Data(tmp_path, rows, family="gemma").encoded()


def test_several_processes_encode_and_refuse_the_same_rows_as_one(tmp_path, monkeypatch):
    def read(processes: int) -> tuple[Any, Any, str]:
        monkeypatch.setattr(chat_tokens, "processes_for", lambda *_, **__: processes)
        refused = [{"messages": asked("Hi", f"{n}", system="no place")} for n in range(9)]
        rows = [*chats(*(("Hi", "abc" * n) for n in range(1, 9))), *refused]
        folder = tmp_path / str(processes)
        with pytest.raises(DataError, match="9 rows that cannot be used") as caught:
            Data(folder, rows, family="gemma").encoded()
        data = Data(folder, rows, family="gemma", bad_rows="drop")
        error = str(caught.value).replace(str(folder), "")
        return data.encoded().train.to_list(), data.counts(), error

    monkeypatch.setattr(chat_tokens, "ROWS_AT_ONCE", 3)
    assert read(1) == read(3)


def test_answers_that_were_cut_off_are_counted_and_told(tmp_path, caplog):
    reasons = ("length", "stop", None)
    rows = [{"messages": asked("Hi", f"Hello {r}"), "finish_reason": r} for r in reasons]
    plain = [{"prompt": "2 + 2 =", "completion": " 4", "finish_reason": "length"}]

    assert Data(tmp_path / "chat", rows).counts().cut_off == 1
    assert Data(tmp_path / "plain", plain).counts().cut_off == 1
    assert (
        "1 of 3 rows have an answer that was cut off (finish_reason: length), whose" in caplog.text
    )


def test_texts_beside_a_chat_template_are_counted_for_a_warning(tmp_path):
    rows = [{"prompt": "Hi", "completion": "Hello"}, {"prompt": "", "completion": "a document"}]

    assert Data(tmp_path, rows).counts().without_template == 1
    assert Data(tmp_path, rows[:1], as_messages=True).counts().without_template == 0
