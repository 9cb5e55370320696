"""Conversations as text, and the parts whose tokens count.

The parts are the answers: what a model generates after the generation prompt, up to and including
the token that ends its turn. They are found from the `{% generation %}` marks of the chat template,
or else from renderings of the conversation up to each answer.
"""

from __future__ import annotations

import copy
import datetime
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import Any, NamedTuple, TypeVar, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from megakd.config.paths import expand_path
from megakd.config.task import TaskConfig
from megakd.data.conversations import ASSISTANT, Conversation, Message, with_arguments
from megakd.data.token_tables import REASONING_MARKS, special_tokens
from megakd.errors import DataError

T = TypeVar("T")


MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

FIXED_DATE = datetime.date(2024, 7, 26)
"""The date in templates that write today's date, so that rows do not depend on the day. Llama's
templates write this date where they cannot read a clock."""

THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)

EMPTY_REASONING = re.compile(
    r"[<\[]([\w:]*(?:think|thought|reason)\w*)[>\]]\s*[<\[]/\1[>\]]", re.IGNORECASE
)

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

SHOWN_CHARACTERS = 40


def read_template(file: str) -> str:
    """Return the chat template in a file."""
    try:
        return expand_path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task.chat_template: {file} cannot be read: {error}") from error


class Rendered(NamedTuple):
    """A conversation as text, with marks in the place of special tokens (see `SpecialTokens`).

    answers: the parts that count, as (first character, character after the last).
    prompts: the numbers of characters that a generator continues, for each answer that counts or
        for a row that is a prompt.
    noticed: what is unusual about the row, among the keys of `chat_tokens.NOTICED`.
    """

    text: str
    answers: list[tuple[int, int]]
    prompts: list[int]
    noticed: tuple[str, ...] = ()


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
        self.special = tuple({*tokenizer.all_special_tokens, *added})
        self.texts = special_tokens(tokenizer)
        self.end = cast("str | None", tokenizer.eos_token) or ""
        self._sources: dict[bool, str] = {}

    def render(self, conversation: Conversation, *, where: str) -> list[Rendered]:
        """Return the texts of a conversation and the parts that count.

        There is one text, unless the template writes the beginning of a conversation in another way
        when the rest follows, as those that drop earlier reasoning: then each text ends with an
        answer, and the answers that count in it are those that the model generates after the text
        before them. With `train_on: each` every answer has a text of its own.
        """
        hidden = replace(
            conversation,
            tools=self.texts.hidden(conversation.tools),
            options=self.texts.hidden(conversation.options),
        )
        messages = [self._prepared(message) for message in conversation.messages or ()]

        def written(*, as_text: bool) -> list[Rendered]:
            asked = [with_arguments(message, as_text=as_text) for message in messages]
            return self._rendered(_Rendering(self, hidden, asked, where))

        try:
            return written(as_text=False)
        except DataError:
            if any("tool_calls" in message for message in messages):
                with suppress(DataError):
                    return written(as_text=True)
            raise

    def _prepared(self, message: Message) -> Message:
        is_answer = message["role"] == ASSISTANT
        if is_answer and self.task.reasoning == "strip":
            message = {key: value for key, value in message.items() if key not in REASONING_KEYS}
            message["content"] = without_reasoning(message["content"])
        hidden = self.texts.hidden(message, leave=REASONING_MARKS if is_answer else ())
        return {**hidden, "role": message["role"]}

    def _rendered(self, rendering: _Rendering) -> list[Rendered]:
        conversation, messages = rendering.conversation, rendering.messages
        rendering.require_calls()
        if conversation.is_prompt:
            text = rendering.up_to(len(messages), prompted=True)
            return [self._as_read(Rendered(text, [], [len(text)]))]
        counted = conversation.counted[-1 if self.task.train_on == "last" else 0 :]
        has_marks = MARKS.search(self.source(conversation.tools)) is not None
        if has_marks and self.task.train_on != "each":
            return [self._read(rendering, rendering.by_marks(counted), counted)]
        texts = list[Rendered]()
        while counted:
            part, learned = rendering, counted
            if texts or self.task.train_on == "each":
                part = rendering.until(counted[-1])
            if self.task.train_on == "each":
                learned = counted[-1:]
            try:
                whole = part.by_marks(learned) if has_marks else part.by_prefixes(learned)
            except _RewrittenError:
                if len(part.messages) == counted[-1] + 1:
                    raise
                part = rendering.until(counted[-1])  # what follows rewrites the last answer
                whole = part.by_prefixes(learned)
            learned = learned[-len(whole.answers) :]
            texts.insert(0, self._read(part, whole, learned))
            counted = counted[: -len(learned)]
        return texts

    def _read(self, rendering: _Rendering, whole: Rendered, counted: Sequence[int]) -> Rendered:
        messages, ends = rendering.messages, list[tuple[int, int]]()
        for begin, end in whole.answers:
            # White space after the token that ends a turn does not count.
            stripped = whole.text[begin:end].rstrip()
            ends.append((begin, begin + len(stripped) if stripped.endswith(self.special) else end))
        is_cut = rendering.conversation.is_cut and counted[-1] == rendering.conversation.counted[-1]
        if is_cut:
            (begin, end), content = ends[-1], (messages[counted[-1]]["content"] or "").strip()
            place = whole.text.rfind(content, begin, end) if content else -1
            ends[-1] = begin, max(begin, place + len(content))
        shown = "".join(whole.text[begin:end] for begin, end in ends)
        contents = "".join(messages[number]["content"] or "" for number in counted)
        empty = [] if EMPTY_REASONING.search(contents) else EMPTY_REASONING.finditer(whole.text)
        noticed = [*whole.noticed]
        if any(_reasoning(messages[n]) not in shown for n in counted):
            noticed.append("lost_reasoning")
        # Its first mark may be in the prompt.
        if any(begin < match.end() <= end for match in empty for begin, end in ends):
            noticed.append("empty_reasoning")
        if is_cut:
            noticed.append("cut_off")
        return self._as_read(whole._replace(answers=ends, noticed=tuple(noticed)))

    def _as_read(self, whole: Rendered) -> Rendered:
        # Special tokens of the template become marks, and hidden ones of the messages text again.
        edges = sorted({0, len(whole.text), *whole.prompts, *(e for a in whole.answers for e in a)})
        parts = [self.texts.swapped(whole.text[a:b]) for a, b in pairwise(edges)]
        places = dict(zip(edges, accumulate(map(len, parts), initial=0), strict=True))
        return whole._replace(
            text="".join(parts),
            answers=[(places[begin], places[end]) for begin, end in whole.answers],
            prompts=[places[end] for end in whole.prompts],
        )

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


class _Rendering(NamedTuple):
    template: ChatTemplate
    conversation: Conversation
    messages: list[Message]
    where: str

    def up_to(self, count: int, *, prompted: bool) -> str:
        return self._rendered(count, add_generation_prompt=prompted)[0]

    def until(self, number: int) -> _Rendering:
        """Return the conversation up to and including a message."""
        return self._replace(messages=self.messages[: number + 1])

    def by_prefixes(self, counted: Sequence[int]) -> Rendered:
        """Return the text, and as many of the last answers as the model could have generated."""
        text, noticed = self._whole()[0], ()
        answers: list[tuple[int, int]] = []
        for number in reversed(counted):
            is_last = number + 1 == len(self.messages)
            try:
                try:
                    begin = self._prefix(text, number, prompted=True)
                except _RewrittenError:
                    if not is_last:
                        raise
                    text, begin, noticed = self._as_asked(text, number)
                end = (
                    len(text) if is_last else self._prefix(text, number + 1, begin, prompted=False)
                )
            except _RewrittenError:
                if not answers:
                    raise
                break
            answers.insert(0, (begin, end))
        return Rendered(text, answers, [begin for begin, _ in answers], noticed)

    def _as_asked(self, text: str, number: int) -> tuple[str, int, tuple[str, ...]]:
        """Return what the model is asked with the last answer, its begin, and what is noticed."""
        before, prompt = (self.up_to(number, prompted=prompted) for prompted in (False, True))
        if text.startswith(before):
            # The prompt of DeepSeek-R1 begins reasoning, which its template leaves out of answers.
            return text, _same(prompt, text), ("begun",)
        # With an answer gpt-oss leaves out the reasoning of the calls before it. What both texts
        # have before the answer is longest where it begins.
        begun = prompt.removeprefix(before)
        places = [match.end() for match in re.finditer(re.escape(begun), text)] if begun else []
        ends = {end: _same(prompt[::-1], text[:end][::-1]) for end in places}
        end = max(ends, key=ends.__getitem__, default=0)
        if ends.get(end, 0) <= len(begun):
            self._prefix(text, number, prompted=True)
        return prompt + text[end:], len(prompt), ()

    def by_marks(self, counted: Sequence[int]) -> Rendered:
        text, marks = self._whole(return_assistant_tokens_mask=True)
        turns = [n for n, m in enumerate(self.messages) if m["role"] == ASSISTANT]
        marks = [mark for mark in marks if mark[0] < mark[1]]
        count = len(marks)
        if self.template.task.train_on == "each":
            # What is marked may be parts of an answer.
            begin = _same(self.up_to(counted[-1], prompted=True), text)
            marks = [mark for mark in marks if mark[1] > begin]
        elif len(marks) == len(turns):
            marks = [mark for mark, turn in zip(marks, turns, strict=True) if turn in counted]
        elif len(counted) < len(turns):
            marks = []
        if not marks:
            raise DataError(
                f"{self.where}: the chat template marks {count} parts with generation, and "
                f"the conversation has {len(turns)} answers, of which {len(counted)} count; mark "
                "every answer once, or remove the marks"
            )
        prompts: list[int] = []
        for place, number in enumerate(counted, start=len(marks) - len(counted)):
            prompt = self.up_to(number, prompted=True)
            same = _same(prompt, text)
            is_prefix = same == len(prompt) < marks[-1][1]
            if not is_prefix:  # such as DeepSeek's, which begins reasoning that the text lacks
                same = self.template.texts.end_of_last(text[:same])
            # A template may mark what it writes into the prompt too.
            marks = [(same if begin < same < end else begin, end) for begin, end in marks]
            if is_prefix or place >= 0:
                prompts.append(same if is_prefix else marks[place][0])
        return Rendered(text, marks, prompts)

    def require_calls(self) -> None:
        """Raise if the template leaves out a call, as those of Gemma 2 and ChatML do.

        Its name may also be in a list of tools or in other messages, so that every call gets a name
        of its own, which has to be in the text.
        """
        messages = copy.deepcopy(self.messages)
        calls = [call["function"] for m in messages for call in m.get("tool_calls", ())]
        names = [call["name"] for call in calls]
        for number, call in enumerate(calls):
            call["name"] += f"_call_{number}"
        whole = self._replace(messages=messages)
        text = whole.up_to(len(messages), prompted=self.conversation.is_prompt) if calls else ""
        for call, name in zip(calls, names, strict=True):
            if call["name"] not in text:
                raise DataError(
                    f"{self.where}: the chat template leaves out a call of the tool {name!r}; "
                    "set task.chat_template to a template that writes tool_calls, or remove the row"
                )

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

    def _prefix(self, text: str, count: int, begin: int = 0, *, prompted: bool) -> int:
        # `begin` is where the answer begins that ends the first messages.
        prefix = self.up_to(count, prompted=prompted)
        if text.startswith(prefix):
            return len(prefix)
        special = self.template.special
        closed = prefix.rstrip()
        ending = max((s for s in special if closed.endswith(s)), key=len, default="")
        bare = closed.removesuffix(ending)
        if ending and text.startswith(bare):
            if not prompted and not bare[begin:].rstrip().endswith(special):
                # Templates such as that of gpt-oss end the last answer with a token of its own.
                rest = text[len(bare) :]
                begun = rest.lstrip()
                other = max((s for s in special if begun.startswith(s)), key=len, default="")
                if other:
                    return len(bare) + len(rest) - len(begun) + len(other)
            # Phi's templates close every text without a prompt for an answer with the end token.
            if ending == self.template.end:
                return len(bare)
        same = _same(prefix, text)
        shown = self.template.texts.shown
        alone, whole = (shown(t[same:])[:SHOWN_CHARACTERS] for t in (prefix, text))
        answer = count + 1 if prompted else count
        raise _RewrittenError(
            f"{self.where}: the chat template renders the beginning of the conversation up to "
            f"answer {answer} differently when the rest follows: after "
            f"{shown(text[:same])[-SHOWN_CHARACTERS:]!r} it writes {alone!r} alone and "
            f"{whole!r} in the whole conversation, so that a model would not learn the "
            "text that it generates; set task.chat_template to a template that does not"
        )


class _RewrittenError(DataError):
    """A template writes a beginning in another way when the rest of the conversation follows."""


def _same(*texts: str) -> int:
    # The number of characters at the beginning that all texts have.
    return len(commonprefix(texts))  # noqa: RUF071 - of texts, not of paths


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
