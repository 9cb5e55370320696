"""CPU time of encoding conversations: questions with answers, and conversations of several turns.

    python benchmarks speed.chat_encoding --tokenizer FOLDER --rows gsm8k/train.jsonl [--turns 8]
        [--copies 4] [--processes 1]

Each line is one repetition: CPU seconds of all threads, wall seconds, and CPU microseconds a token.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer

from lib.options import parser_of
from megakd.config.task import TaskConfig
from megakd.data.arrow import PLACE
from megakd.data.chat.conversations import CONVERSATION, Conversation
from megakd.data.chat.tokens import ChatEncoder, tables_of_conversations
from megakd.process import workers


def conversations(file: Path, turns: int) -> Dataset:
    """Return rows of question and answer, with this number of answers in each conversation."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    made: list[str] = []
    for start in range(0, len(rows) - turns + 1, turns):
        messages = [
            {"role": role, "content": row[key]}
            for row in rows[start : start + turns]
            for role, key in (("user", "question"), ("assistant", "answer"))
        ]
        counted = list(range(1, len(messages), 2))
        made.append(Conversation(messages=messages, counted=counted).to_json())
    return Dataset.from_dict({CONVERSATION: made, PLACE: [f"row {n}" for n in range(len(made))]})


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--copies", type=int, default=1, help="how often the rows are repeated")
    parser.add_argument("--processes", type=int, default=workers.MOST, help="at most")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    task = TaskConfig(type="causal_lm", dataset="rows", max_length=2**20)
    rows = concatenate_datasets([conversations(given.rows, given.turns)] * given.copies)
    workers.MOST = given.processes
    for _ in range(given.repeats):
        cpu, wall = sum(os.times()[:4]), time.perf_counter()
        encoder = ChatEncoder(tokenizer, task)
        tables = list(tables_of_conversations(rows, encoder, name="train", counts={}))
        tokens = sum(len(table.column("input_ids").combine_chunks().flatten()) for table in tables)
        cpu, wall = sum(os.times()[:4]) - cpu, time.perf_counter() - wall
        print(
            f"{len(rows)} conversations of {given.turns} answers, {tokens} tokens: {cpu:.2f} s of "
            f"CPU, {wall:.2f} s, {1e6 * cpu / tokens:.1f} us a token"
        )
    return 0
