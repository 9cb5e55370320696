"""Conversations as text, and the parts of the text whose tokens count.

The parts are the answers: what a model generates after the generation prompt, up to and including
the token that ends its turn. They are found from the `{% generation %}` marks of the chat template,
or else from renderings of the conversation up to each answer.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from megakd.config.task import TaskConfig
from megakd.data.chat.conversations import ASSISTANT, Conversation, Message, with_arguments
from megakd.errors import DataError
from megakd.process.terminal import in_home

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
FIXED_DATE = datetime.date(2024, 7, 26)
"""The date in templates that write today's date, so that rows do not depend on the day. Llama's
templates write this date where they cannot read a clock."""
THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
SHOWN_CHARACTERS = 40


def read_template(file: str) -> str:
    """Return the chat template in a file."""
    try:
        return in_home(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task.chat_template: {file} cannot be read: {error}") from error


class Rendered(NamedTuple):
    """A conversation as text.

    answers: the parts that count, as (first character, character after the last).
    prompt_end: the number of characters that a generator continues.
    lost_reasoning: whether the template has left out the reasoning of an answer.
    lost_tools: whether the template has left out the name of a tool of the row.
    """

    text: str
    answers: list[tuple[int, int]]
    prompt_end: int
    lost_reasoning: bool = False
    lost_tools: bool = False


class ChatTemplate:
    """The chat template of a tokenizer with the settings of a task."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the rows are conversations, and the tokenizer has no chat template; set "
                "task.chat_template to a file with a template in Jinja, or give prompt and "
                "completion as plain texts"
            )
        self.tokenizer, self.task = tokenizer, task
        added = cast("Any", tokenizer).get_added_vocab()
        self._special = tuple({*tokenizer.all_special_tokens, *added})
        self.end = cast("str | None", tokenizer.eos_token) or ""
        self._sources: dict[bool, str] = {}

    def render(self, conversation: Conversation, *, where: str) -> Rendered:
        """Return the text of a conversation and the parts that count."""
        messages = [_prepared(m, self.task) for m in conversation.messages or ()]
        try:
            made = [with_arguments(message, as_text=False) for message in messages]
            return self._rendered(conversation, made, where)
        except DataError:
            if not any("tool_calls" in message for message in messages):
                raise
            made = [with_arguments(message, as_text=True) for message in messages]
            with suppress(DataError):
                return self._rendered(conversation, made, where)
            raise

    def _rendered(
        self, conversation: Conversation, messages: list[Message], where: str
    ) -> Rendered:
        view = _View(self, conversation, messages, where)
        if conversation.is_prompt:
            text = view.up_to(len(messages), prompted=True)
            return Rendered(text, [], len(text), lost_tools=_loses_tools(conversation, text))
        counted = (
            conversation.counted[-1:] if self.task.train_on == "last" else conversation.counted
        )
        has_marks = MARKS.search(self.source(conversation.tools)) is not None
        made = view.by_marks(counted) if has_marks else view.by_prefixes(counted)
        ends: list[tuple[int, int]] = []
        for begin, end in made.answers:
            # White space after the token that ends a turn does not count.
            stripped = made.text[begin:end].rstrip()
            ends.append((begin, begin + len(stripped) if stripped.endswith(self._special) else end))
        shown = "".join(made.text[begin:end] for begin, end in ends)
        # Marks may leave calls out of what counts.
        answers = {} if has_marks else dict.fromkeys(counted, shown)
        _require_calls(messages, made.text, answers=answers, where=where)
        lost = any(_reasoning(messages[number]) not in shown for number in counted)
        lost_tools = _loses_tools(conversation, made.text)
        return made._replace(answers=ends, lost_reasoning=lost, lost_tools=lost_tools)

    def source(self, tools: Sequence[Any] | None) -> str:
        """Return the text of the template, with a fixed date in place of today's."""
        key = tools is not None  # some tokenizers have a template of their own for tools
        if key not in self._sources:
            try:
                template = self.tokenizer.get_chat_template(tools=cast("list[Any] | None", tools))
            except ValueError as error:  # several templates, and none of them is the default
                raise DataError(f"{error}; set task.chat_template to a file") from error
            fixed = TODAY.sub(lambda call: repr(FIXED_DATE.strftime(call[2])), template)
            self._sources[key] = fixed
        return self._sources[key]


class _View(NamedTuple):
    template: ChatTemplate
    conversation: Conversation
    messages: list[Message]
    where: str

    def up_to(self, count: int, *, prompted: bool) -> str:
        return self._rendered(count, add_generation_prompt=prompted)[0]

    def by_prefixes(self, counted: Sequence[int]) -> Rendered:
        text = self._whole()[0]
        answers: list[tuple[int, int]] = []
        for number in counted:
            begin = self._prefix(text, number, prompted=True)
            is_last = number + 1 == len(self.messages)
            end = len(text) if is_last else self._prefix(text, number + 1, prompted=False)
            answers.append((begin, end))
        return Rendered(text, answers, answers[-1][0])

    def by_marks(self, counted: Sequence[int]) -> Rendered:
        text, marks = self._whole(return_assistant_tokens_mask=True)
        turns = [n for n, m in enumerate(self.messages) if m["role"] == ASSISTANT]
        marks = [mark for mark in marks if mark[0] < mark[1]]
        if len(marks) == len(turns):
            marks = [mark for mark, turn in zip(marks, turns, strict=True) if turn in counted]
        elif len(counted) < len(turns) or not marks:
            raise DataError(
                f"{self.where}: the chat template marks {len(marks)} parts with generation, and "
                f"the conversation has {len(turns)} answers, of which {len(counted)} count; mark "
                "every answer once, or remove the marks"
            )
        prompt = self.up_to(counted[-1], prompted=True)
        is_prefix = text.startswith(prompt) and len(prompt) <= marks[-1][0]
        return Rendered(text, marks, len(prompt) if is_prefix else marks[-1][0])

    def _whole(self, **keys: bool) -> tuple[str, list[tuple[int, int]]]:
        text, marks = self._rendered(len(self.messages), **keys)
        for message in self.messages:
            role, content = message["role"], (message["content"] or "").strip()
            # Templates write results of tools and answers in forms of their own.
            if role not in (ASSISTANT, "tool") and content not in text:
                raise DataError(
                    f"{self.where}: the chat template leaves out the message of role {role!r} "
                    f"({content[:SHOWN_CHARACTERS]!r}); use the roles of the template, or set "
                    "task.chat_template to a template that writes this role"
                )
        return text, marks

    def _rendered(self, count: int, **keys: bool) -> tuple[str, list[tuple[int, int]]]:
        # The text of the first messages, and the parts that the template marks.
        messages, template, row = self.messages[:count], self.template, self.conversation
        try:
            rendered: Any = render_jinja_template(
                [messages],
                tools=row.tools,
                chat_template=template.source(row.tools),
                **{
                    **template.tokenizer.special_tokens_map,
                    **template.task.chat_template_kwargs,
                    **row.options,
                    **keys,
                },
            )
        except Exception as error:  # a template may do anything that Python can refuse
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{self.where}: the chat template refuses the conversation (roles: "
                f"{roles or 'none before the first answer'}): {error}"
            ) from error
        texts, marks = rendered
        return texts[0], marks[0] if marks else []

    def _prefix(self, text: str, count: int, *, prompted: bool) -> int:
        prefix = self.up_to(count, prompted=prompted)
        # Phi's templates close every text without a prompt for an answer with the end token.
        for begun in (prefix, prefix.removesuffix(self.template.end)):
            if text.startswith(begun):
                return len(begun)
        pairs = enumerate(zip_longest(prefix, text))
        same = next(place for place, (a, b) in pairs if a != b)
        alone, whole = (t[same : same + SHOWN_CHARACTERS] for t in (prefix, text))
        answer = count + 1 if prompted else count
        raise DataError(
            f"{self.where}: the chat template renders the beginning of the conversation up to "
            f"answer {answer} differently when the rest follows: after "
            f"{text[max(0, same - SHOWN_CHARACTERS) : same]!r} it writes {alone!r} alone and "
            f"{whole!r} in the whole conversation, so that a model would not learn the "
            f"text that it generates; {_remedy(self.conversation, count)}"
        )


def _require_calls(
    messages: Sequence[Message], text: str, *, answers: Mapping[int, str], where: str
) -> None:
    # The templates of Llama 3, Gemma 2 and ChatML write `content` alone, so that an answer with a
    # call would be learned as an empty answer.
    for number, message in enumerate(messages):
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in answers.get(number, text):
                raise DataError(
                    f"{where}: the chat template leaves out a call of the tool {name!r}; set "
                    "task.chat_template to a template that writes tool_calls, or remove the row"
                )


def _loses_tools(conversation: Conversation, text: str) -> bool:
    # The templates of Gemma 2 and ChatML take no tools. OpenAI's form of a tool is an object with
    # the key `function`, whose value has the name; a tool may also be this value alone.
    for tool in conversation.tools or ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str) and name not in text:
            return True
    return False


def _remedy(conversation: Conversation, count: int) -> str:
    if count < conversation.counted[-1]:
        return (
            "set task.train_on: last to learn only the last answer of each conversation, or set "
            "task.chat_template to a template that does not rewrite earlier answers"
        )
    return (
        "check task.chat_template_kwargs and task.reasoning (enable_thinking: false contradicts "
        "answers with reasoning), or set task.chat_template to another template"
    )


def _prepared(message: Message, task: TaskConfig) -> Message:
    if task.reasoning == "keep" or message["role"] != ASSISTANT:
        return message
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    return {**kept, "content": without_reasoning(message["content"])}


def without_reasoning(text: str) -> str:
    """Return an answer without its <think>…</think>, of which the beginning may be missing."""
    text = THINKING.sub("", text)
    return text.split("</think>", 1)[-1].lstrip() if "</think>" in text else text


def _reasoning(message: Message) -> str:
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str):
            return message[key].strip()
    before, mark, _ = (message["content"] or "").partition("</think>")
    return before.replace("<think>", "").strip() if mark else ""
