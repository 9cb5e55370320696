"""Write a teacher's answers to prompts, from which a student of any tokenizer learns."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.commands.arguments import Parser, say
from megakd.errors import ConfigError, DataError, ModelError, ServerError, first_line
from megakd.process.files import check_given, write_text
from megakd.process.terminal import in_home, print_aside

if TYPE_CHECKING:
    from megakd.data.arrow import Record

Messages = list[dict[str, Any]]
Answers = Callable[[Sequence[Messages]], list[tuple[str, str]]]
"""Conversations -> the text of each answer and why it ended: `stop` or `length`."""
AT_ONCE = 8
"""Requests to a server at a time."""
_REASONS = {True: "stop", False: "length"}


def add_options(parser: Parser) -> None:
    """Add the teacher, the prompts, the file of the answers and the sampling."""
    parser.add_argument("model", metavar="TEACHER", help="a folder, a Hub id, or a name at --url")
    parser.add_argument(
        "--data",
        metavar="F",
        type=in_home,
        required=True,
        help="rows of messages (a last answer is left out), prompt, question or instruction",
    )
    parser.add_argument("--to", metavar="F", type=in_home, required=True, help="jsonl of answers")
    parser.add_argument(
        "--url",
        metavar="U",
        help="an API like OpenAI's, such as http://localhost:8000; its key is in OPENAI_API_KEY",
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest text"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--rows_at_once", type=int, default=16, metavar="B", help="rows that are continued together"
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer the prompts that have no answer yet, and print what is in the file."""
    if min(arguments.max_new_tokens, arguments.rows_at_once) < 1 or arguments.temperature < 0:
        raise ConfigError(
            "--max_new_tokens and --rows_at_once must be at least 1, --temperature at least 0"
        )
    prompts = read_prompts(arguments.data)
    sampling = {k: getattr(arguments, k) for k in ("max_new_tokens", "temperature", "seed")}
    sampling = {"model": arguments.model, **sampling}
    size = arguments.rows_at_once
    reasons = answered(arguments.to, prompts, sampling, rows_at_once=size)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megakd").setLevel(logging.INFO)
    with print_aside():
        if len(reasons) < len(prompts):
            from megakd.engine.collectives import doing, told

            ask = _server(arguments) if arguments.url else _local(arguments)
            starts = range(len(reasons), len(prompts), size)
            with doing("answering"), arguments.to.open("a", encoding="utf-8") as file:
                for first in told(starts, total=len(prompts) - len(reasons), each=size):
                    block = prompts[first : first + size]
                    for prompt, (text, reason) in zip(block, ask(block), strict=True):
                        messages = [*prompt, {"role": "assistant", "content": text}]
                        row = {"messages": messages, "finish_reason": reason, "sampling": sampling}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        reasons.append(reason)
                    file.flush()
                    os.fsync(file.fileno())
    cut = reasons.count("length")
    say(f"{arguments.to}: {len(reasons)} answers, of which {cut} reached --max_new_tokens")


def read_prompts(path: Path) -> list[Messages]:
    """Return the conversations of a file up to the last message of the user.

    Raises:
        DataError: the file cannot be read, or a row is no conversation and no prompt.
    """
    if not path.is_file():
        raise DataError(f"--data: {path} does not exist")
    from megakd.data.conversations import MESSAGES_DEFAULTS, PAIRS
    from megakd.data.readers import files_table

    table = files_table([path], "--data")
    known = (*MESSAGES_DEFAULTS, *(asked for asked, _ in PAIRS))
    column = next((name for name in known if name in table.columns), None)
    if column is None:
        raise DataError(
            f"{path} holds no conversations: a row has {', '.join(known)}; it "
            f"has {', '.join(table.columns) or 'no column'}"
        )
    return [_prompt(path, column, record) for record in table.records()]


def _prompt(path: Path, column: str, record: Record | DataError) -> Messages:
    from megakd.data.conversations import (
        INPUT,
        MESSAGES_DEFAULTS,
        ChatColumns,
        conversation_of,
        messages_of,
    )

    if isinstance(record, DataError):
        raise record
    if column not in MESSAGES_DEFAULTS:
        columns = ChatColumns(prompt=column, addition=INPUT, as_messages=True)
        return conversation_of(str(path), columns, record).messages or []
    where = f"{path}, {record.place}"
    messages = messages_of(record.values.get(column), where=f"{where}: column {column!r}")
    asked = [n for n, one in enumerate(messages) if one["role"] in ("user", "tool")]
    if not asked:
        raise DataError(f"{where}: messages have no turn of the user to answer")
    return messages[: asked[-1] + 1]


def answered(
    path: Path, prompts: Sequence[Messages], sampling: Mapping[str, Any], *, rows_at_once: int
) -> list[str]:
    """Return why each answer of an earlier start ended, and leave these answers in its file.

    A line that a kill has cut is removed, and a block of rows that was cut is drawn again as a
    whole.

    Raises:
        DataError: the file holds answers to other prompts, or of other settings.
    """
    if not path.exists():
        return []
    # Not str.splitlines, which also cuts at U+2028 within a text.
    with path.open(encoding="utf-8", newline="\n") as file:
        lines = file.readlines()
    whole, reasons = [line for line in lines if line.endswith("\n")], list[str]()
    for number, line in enumerate(whole, 1):
        row = json.loads(line) if line.startswith('{"messages": [') else {}
        is_ours = number <= len(prompts) and row.get("messages", [])[:-1] == prompts[number - 1]
        if not is_ours or row.get("sampling") != sampling:
            other = f"settings ({row.get('sampling')})" if is_ours else "prompts"
            raise DataError(f"{path}, line {number} is of other {other}; give another --to")
        reasons.append(row["finish_reason"])
    if len(whole) < len(prompts):
        whole = whole[: len(whole) - len(whole) % rows_at_once]
    if whole != lines:
        write_text(path, "".join(whole))
    return reasons[: len(whole)]


def _local(arguments: argparse.Namespace) -> Answers:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megakd.config.sections import Sampling
    from megakd.data.files import silent_hub
    from megakd.models.end_tokens import TextTokens, end_tokens_of
    from megakd.models.generation import complete

    folder = in_home(arguments.model)
    silent = None if folder.is_dir() else silent_hub()
    if folder.is_dir():
        check_given(folder, "TEACHER")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
    except (OSError, ValueError) as error:
        problem = "is no causal language model"
        if silent:
            problem = "is not a local folder and cannot be downloaded from the Hub"
        raise ModelError(f"{arguments.model} {problem}: {silent or first_line(error)}") from error
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{arguments.model} has no chat template, which says where an answer begins"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ends = end_tokens_of(tokenizer, model.config, model.generation_config)
    tokens = TextTokens(ends, tokenizer.pad_token_id or 0, len(tokenizer))
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature)
    encode = partial(
        tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=True, return_dict=False
    )

    def answers(block: Sequence[Messages]) -> list[tuple[str, str]]:
        prompts = [encode(messages) for messages in block]
        # A seed by the prompts, so that a start that goes on draws as one that was never stopped.
        seeds = [arguments.seed + sum(prompt) for prompt in prompts]
        texts = complete(
            model, prompts, seeds, sampling, tokens=tokens, rows_at_once=arguments.rows_at_once
        )
        return [
            (tokenizer.decode(one.ids, skip_special_tokens=True), _REASONS[one.finished])
            for one in texts
        ]

    return answers


def _server(arguments: argparse.Namespace) -> Answers:
    from pydantic import BaseModel

    from megakd.config.sections import address
    from megakd.teachers.servers import JsonServer, running_calls

    class Message(BaseModel):
        content: str | None

    class Choice(BaseModel):
        message: Message
        finish_reason: str

    server = JsonServer(
        address(arguments.url), time_limit_s=600.0, key=os.environ.get("OPENAI_API_KEY")
    )

    def ask(messages: Messages) -> tuple[str, str]:
        body = {"model": arguments.model, "messages": messages, "seed": arguments.seed}
        body |= {"max_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
        choices = server.ask("/v1/chat/completions", body).read("choices", list[Choice])
        if not choices:
            raise ServerError(f"{arguments.url}: an answer has no choices")
        text, reason = choices[0].message.content, choices[0].finish_reason
        if text is None:
            raise ServerError(
                f"{arguments.url}: an answer of finish_reason {reason} has no content; start vLLM "
                "without --reasoning-parser, which takes the reasoning out of the content, or "
                "raise --max_new_tokens"
            )
        return text, reason

    def answers(block: Sequence[Messages]) -> list[tuple[str, str]]:
        return running_calls([partial(ask, one) for one in block], at_once=AT_ONCE)()

    return answers
