"""Write a teacher's answers to prompts, from which a student of any tokenizer learns."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.commands.arguments import Parser, say
from megakd.config.paths import expand_path
from megakd.config.sections import Sampling, address
from megakd.config.task import TaskConfig
from megakd.errors import ConfigError, DataError, ModelError, ServerError, first_line
from megakd.process.files import write_text
from megakd.process.seals import check_given
from megakd.process.terminal import print_aside

if TYPE_CHECKING:
    from megakd.data.conversations import Conversation, Message

logger = logging.getLogger(__name__)

AT_ONCE = 8
"""Requests to a server at a time."""
CUT = re.compile(r"(model_)?length|max(_output)?_tokens", re.IGNORECASE)
ENDED = re.compile(r"stop.*|eos.*|end_turn|completed?|tool_.*|function_call", re.IGNORECASE)
"""Finish reasons of whole answers; others, such as content_filter and abort, end none."""
WITHOUT_REPLY, UNREADABLE = "without a reply", "without a readable answer"
Settings = Mapping[str, Any]
Answer = tuple["Message | None", str]
"""An answer and why it ended, or None and why its prompt is left out."""
Answers = Callable[[Sequence["Conversation"]], list[Answer]]


def add_options(parser: Parser) -> None:
    """Add the teacher, the prompts, the file of the answers and the sampling."""
    parser.add_argument("model", metavar="TEACHER", help="a folder, a Hub id, or a name at --url")
    parser.add_argument(
        "--data",
        metavar="F",
        type=expand_path,
        required=True,
        help="rows of messages (a last answer is left out), prompt, question or instruction",
    )
    parser.add_argument(
        "--to", metavar="F", type=expand_path, required=True, help="jsonl of answers"
    )
    parser.add_argument(
        "--url",
        metavar="U",
        help="an API like OpenAI's, such as http://localhost:8000; its key is in OPENAI_API_KEY",
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: 0, the likeliest text"
    )
    parser.add_argument("--top_p", type=float, metavar="P", help="default: the server's, or 1")
    parser.add_argument("--system", metavar="TEXT", help="system message of prompts without one")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--rows_at_once", type=int, default=16, metavar="B", help="rows that are continued together"
    )


def run(arguments: argparse.Namespace) -> None:
    """Answer the prompts that have no answer yet, and print what is in the file."""
    names = ("model", "max_new_tokens", "temperature", "seed", "top_p")
    sampling = {k: v for k in names if (v := getattr(arguments, k, None)) is not None}
    counts, top_p = (arguments.max_new_tokens, arguments.rows_at_once), sampling.get("top_p", 1)
    is_finite = 0 <= arguments.temperature < math.inf
    if min(counts) < 1 or not is_finite or not 0 < top_p <= 1:
        raise ConfigError(
            "--max_new_tokens and --rows_at_once must be at least 1, --temperature at least 0, "
            "--top_p above 0 and at most 1"
        )
    system = getattr(arguments, "system", None)
    if system is not None and not system.strip():
        raise ConfigError("--system is empty; give it a text, or leave it out")
    prompts = read_prompts(arguments.data, system=system)
    reasons, left = answered(arguments.to, prompts, sampling), ""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megakd").setLevel(logging.INFO)
    with print_aside():
        if len(reasons) < len(prompts):
            left = _answer(arguments, prompts, sampling, reasons)
    cut = [*reasons.values()].count("length")
    say(f"{arguments.to}: {len(reasons)} answers, of which {cut} reached --max_new_tokens{left}")


def _answer(
    arguments: argparse.Namespace,
    prompts: Sequence[Conversation],
    sampling: Settings,
    reasons: dict[int, str],
) -> str:
    """Write the answers that the file lacks, and return how many prompts are left out, and why."""
    from megakd.engine.collectives import activity, progress

    ask, size = (_server if arguments.url else _local)(arguments, sampling), arguments.rows_at_once
    asked, left = [n for n in range(len(prompts)) if n not in reasons], dict[str, list[str]]()
    if arguments.temperature and not arguments.url:  # draws depend on the block, which a kill cuts
        blocks = sorted({n // size for n in asked})
        asked = [n for block in blocks for n in range(len(prompts))[block * size :][:size]]
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    with activity("answering"), arguments.to.open("a", encoding="utf-8") as file:
        for first in progress(range(0, len(asked), size), total=len(asked), each=size):
            block = asked[first : first + size]
            answers = ask([prompts[n] for n in block])
            for n, (answer, reason) in zip(block, answers, strict=True):
                if answer is None:
                    texts = left.setdefault(reason.partition(":")[0], [])
                    texts.append(f"prompt {n + 1} is left out: {reason}")
                    if len(texts) <= 3:
                        logger.warning("%s", texts[-1])
                elif n not in reasons:
                    row = {"messages": [*(prompts[n].messages or ()), answer], **_more(prompts[n])}
                    row |= {"finish_reason": reason, "sampling": sampling}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    reasons[n] = reason
            file.flush()
            os.fsync(file.fileno())
            if all(reason.startswith(WITHOUT_REPLY) for _, reason in answers):
                raise ServerError(answers[0][1].removeprefix(f"{WITHOUT_REPLY}: "))
    counts = ", ".join(f"{len(texts)} {reason}" for reason, texts in left.items())
    if not reasons:
        raise ModelError(
            f"{arguments.model} answers no prompt ({counts}): {next(iter(left.values()))[0]}"
        )
    return f"; left out, and asked again by the same command: {counts}" if left else ""


def read_prompts(path: Path, *, system: str | None = None) -> list[Conversation]:
    """Return the conversations of a file up to the last message of the user, with a system message.

    Raises:
        DataError: the file cannot be read, or a row is no conversation and no prompt.
    """
    if not path.is_file():
        raise DataError(f"--data: {path} does not exist")
    from megakd.data import conversations as chats
    from megakd.data.readers import files_table

    table = files_table([path], "--data")
    known = (*chats.MESSAGES_DEFAULTS, *(asked for asked, _ in chats.PAIRS))
    column = next((name for name in known if name in table.columns), None)
    if column is None:
        raise DataError(
            f"{path} holds no conversations: a row has {', '.join(known)}; it "
            f"has {', '.join(table.columns) or 'no column'}"
        )
    columns = chats.ChatColumns(prompt=column, addition=chats.INPUT, as_messages=True)
    prompts: list[Conversation] = []
    for record in table.records():
        if isinstance(record, DataError):
            raise record
        where = f"{path}, {record.place}"
        if column in chats.MESSAGES_DEFAULTS:  # a text would be a prompt
            chats.messages_of(record.values.get(column), where=f"{where}: column {column!r}")
        row = chats.conversation_of(str(path), columns, record)
        messages = row.messages or []
        asked = [n for n, one in enumerate(messages) if one["role"] in ("user", "tool")]
        if not asked:
            roles = ", ".join(one["role"] for one in messages)
            raise DataError(f"{where}: no turn of the user to answer (roles: {roles})")
        messages = messages[: asked[-1] + 1]
        if system and not any(one["role"] in ("system", "developer") for one in messages):
            messages = [{"role": "system", "content": system}, *messages]
        prompts.append(replace(row, messages=messages, tools=row.tools or None))
        prompts[-1].to_json(where)  # what JSON cannot hold is refused here
    return prompts


def answered(path: Path, prompts: Sequence[Conversation], sampling: Settings) -> dict[int, str]:
    """Return why the answers of earlier starts ended, by the numbers of their prompts.

    A line that a kill has cut is removed.

    Raises:
        DataError: the file holds answers to other prompts, or of other settings.
    """
    if not path.exists():
        return {}
    from megakd.data.conversations import OPTIONS, TOOLS, Conversation

    # Not str.splitlines, which also cuts at U+2028 within a text.
    with path.open(encoding="utf-8", newline="\n") as file:
        lines = file.readlines()
    whole, reasons = [line for line in lines if line.endswith("\n")], dict[int, str]()
    numbers: dict[str, list[int]] = {}
    for number in reversed(range(len(prompts))):  # a prompt that occurs twice has two answers
        numbers.setdefault(prompts[number].to_json(""), []).append(number)
    for number, line in enumerate(whole, 1):
        row = json.loads(line) if line.startswith('{"messages": [') else {"messages": []}
        more = {"tools": row.get(TOOLS), "options": row.get(OPTIONS, {})}
        same = numbers.get(Conversation(messages=row["messages"][:-1], **more).to_json(""))
        if not same or row.get("sampling") != sampling:
            other = f"settings ({row.get('sampling')})" if same else "prompts"
            raise DataError(f"{path}, line {number} is of other {other}; give another --to")
        reasons[same.pop()] = str(row["finish_reason"])
    if whole != lines:
        write_text(path, "".join(whole))
    return reasons


def _more(prompt: Conversation) -> dict[str, object]:
    # What a row has beside its messages, for requests and for the row of the answer.
    more = {"tools": prompt.tools, "chat_template_kwargs": prompt.options}
    return {key: value for key, value in more.items() if value}


def _judged(message: Message, ending: str) -> Answer:
    """Return a message with the keys that training reads, or None and why nothing is learned."""
    from megakd.data.chat_template import REASONING_KEYS, without_reasoning
    from megakd.data.conversations import Conversation, from_json, messages_of
    from megakd.data.token_tables import REASONING_MARKS

    is_cut = CUT.fullmatch(ending) is not None
    if not is_cut and not ENDED.fullmatch(ending):
        return None, f"finish_reason {ending}"
    if message.get("refusal"):
        return None, f"a refusal: {message['refusal']}"
    thoughts = (message.get(key) for key in REASONING_KEYS)
    thought = next((t for t in thoughts if isinstance(t, str) and t.strip()), None)
    calls = None if is_cut else message.get("tool_calls")  # a cut call is none
    said = {"role": "assistant", "content": message.get("content") or ""}
    said |= {"reasoning_content": thought, "tool_calls": calls or None}
    try:
        (whole,) = messages_of([said], where="its answer")
        Conversation(messages=[whole]).to_json("its answer")
    except DataError as error:
        return None, f"{UNREADABLE}: {error}"
    for function in (call["function"] for call in whole.get("tool_calls", ())):
        function["arguments"] = function["arguments"] or "{}"
        if not isinstance(from_json(function["arguments"]), dict):
            return None, f"{UNREADABLE}: the arguments of a call are no JSON object: {function}"
    text = without_reasoning(whole["content"]).partition(REASONING_MARKS[0])[0]
    if not calls and not text.strip():
        what = "reasoning without a text" if thought or whole["content"].strip() else "no text"
        return None, f"{what} within --max_new_tokens" if is_cut else what
    return whole, "length" if is_cut else "tool_calls" if calls else "stop"


def _loaded(name: str) -> tuple[Any, Any]:
    """Return the tokenizer and the model of a folder or of the Hub."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megakd.data.hub import silent_hub

    folder = expand_path(name)
    silent = None if folder.is_dir() else silent_hub()
    if folder.is_dir():
        check_given(folder, "TEACHER")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        problem = "is no causal language model"
        if silent:
            problem = "is not a local folder and cannot be downloaded from the Hub"
        raise ModelError(f"{name} {problem}: {silent or first_line(error)}") from error
    if tokenizer.chat_template is None:
        raise ModelError(f"{name} has no chat template, which says where an answer begins")
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu")


def _local(arguments: argparse.Namespace, how: Settings) -> Answers:
    from megakd.data.chat_template import ChatTemplate
    from megakd.models import end_tokens, generation
    from megakd.models.architectures import context_length

    tokenizer, model = _loaded(arguments.model)
    ends = end_tokens.end_tokens_of(tokenizer, model.config, model.generation_config)
    tokens = end_tokens.TextTokens(ends, tokenizer.pad_token_id or 0, len(tokenizer))
    sampling = Sampling(arguments.max_new_tokens, arguments.temperature, how.get("top_p", 1.0))
    template = ChatTemplate(tokenizer, TaskConfig(type="causal_lm"))
    context, size = context_length(model.config), arguments.rows_at_once

    def encoded(prompt: Conversation) -> list[int]:
        text = template.render(prompt, where="")[0].text
        if prompt.tools and text == template.render(replace(prompt, tools=None), where="")[0].text:
            raise DataError("the chat template of the teacher leaves out the tools")
        ids = tokenizer(template.texts.shown(text), add_special_tokens=False)["input_ids"]
        generation.check_prompt_lengths([len(ids)], sampling.max_new_tokens, context)
        return ids

    def answers(block: Sequence[Conversation]) -> list[Answer]:
        results: list[Answer] = [(None, "")] * len(block)
        prompts: dict[int, list[int]] = {}
        for number, prompt in enumerate(block):
            try:
                prompts[number] = encoded(prompt)
            except DataError as error:
                results[number] = (
                    None,
                    f"refused: {str(error).removeprefix('prompt 0').lstrip(': ')}",
                )
        # A seed by the prompts, so that a start that goes on draws as one that was never stopped.
        seeds = [arguments.seed + sum(ids) for ids in prompts.values()]
        texts = generation.complete(
            model, [*prompts.values()], seeds, sampling, tokens=tokens, rows_at_once=size
        )
        for number, text in zip(prompts, texts, strict=True):
            content = tokenizer.decode(text.ids, skip_special_tokens=True)
            results[number] = _judged({"content": content}, "stop" if text.finished else "length")
        return results

    return answers


def _server(arguments: argparse.Namespace, sampling: Settings) -> Answers:
    from pydantic import BaseModel

    from megakd.data.conversations import with_arguments
    from megakd.teachers.servers import JsonServer, running_calls

    class Choice(BaseModel):
        message: dict[str, object]
        finish_reason: str

    server = JsonServer(
        address(arguments.url), time_limit_s=600.0, key=os.environ.get("OPENAI_API_KEY")
    )
    settings = {**sampling, "max_tokens": sampling["max_new_tokens"]}
    del settings["max_new_tokens"]

    def ask(prompt: Conversation) -> Answer:
        messages = [with_arguments(message, as_text=True) for message in prompt.messages or ()]
        body, kind = {**settings, "messages": messages, **_more(prompt)}, WITHOUT_REPLY
        try:
            reply = server.ask("/v1/chat/completions", body)
            # The key and the address are those of all prompts.
            kinds = {200: UNREADABLE, 401: WITHOUT_REPLY, 404: WITHOUT_REPLY}
            kind = kinds.get(reply.status, "refused")
            (choice,) = reply.read("choices", tuple[Choice])
        except ServerError as error:
            return None, f"{kind}: {error}"
        except ValueError as error:  # such as NaN
            return None, f"refused: no JSON: {error}"
        return _judged(choice.message, choice.finish_reason)

    def answers(block: Sequence[Conversation]) -> list[Answer]:
        return running_calls([partial(ask, one) for one in block], at_once=AT_ONCE)()

    return answers
