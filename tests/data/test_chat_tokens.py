"""Conversations as tokens, with the templates of real models."""

from __future__ import annotations

import re

import numpy as np
import pytest
from chat_tokenizers import FAMILIES, asked, chat_tokenizer, template_of
from encoded_chats import ADD, CALL, IGNORE, assert_row, chat, encoded, rows_of, task
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megakd.data.chat_tokens import ChatEncoder
from megakd.data.conversations import Conversation
from megakd.errors import DataError

# How a family asks, what ends an answer, and what follows it.
CHATML = ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", "\n")
GEMMA = ("<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>", "\n")
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA = (f"{HEADER.format('user')}{{}}<|eot_id|>{HEADER.format('assistant')}", "<|eot_id|>", "")
PHI_3 = ("<|user|>\n{}<|end|>\n<|assistant|>\n", "<|end|>", "\n")
PHI_4 = ("<|user|>{}<|end|><|assistant|>", "<|end|>", "")
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA_SYSTEM = f"<|begin_of_text|>{HEADER.format('system')}{DATES}"


def plain(row):
    return row.input_ids.tolist(), row.labels.tolist(), row.prompt_length


def learned(tokenizer, row):
    """The text of all targets."""
    return tokenizer.decode(row.labels[row.labels != IGNORE].tolist())


@pytest.mark.parametrize(
    ("family", "system", "beginning", "first", "turn"),
    [
        ("chatml", None, "", "Hi", CHATML),
        ("marks", None, "", "Hi", CHATML),
        ("gemma", None, "<bos>", "Hi", GEMMA),
        ("gemma3", "Be kind", "<bos>", "Be kind\n\nHi", GEMMA),
        ("llama3", None, "<|begin_of_text|>", "Hi", LLAMA),
        # with a date that is always the same
        ("llama32", None, f"{LLAMA_SYSTEM}<|eot_id|>", "Hi", LLAMA),
        ("llama32", "Be kind", f"{LLAMA_SYSTEM}Be kind<|eot_id|>", "Hi", LLAMA),
        ("phi3", "Be kind", "<|system|>\nBe kind<|end|>\n", "Hi", PHI_3),
        ("phi4_mini", "Be kind", "<|system|>Be kind<|end|>", "Hi", PHI_4),
    ],
)
def test_every_answer_and_its_end_count_and_nothing_else(family, system, beginning, first, turn):
    tokenizer = chat_tokenizer(family, merges=family != "llama3")
    messages = asked("Hi", "Hello", "Bye", "See you", system=system)
    prompt, end, after = turn

    row = encoded(tokenizer, chat(messages))

    last, tail = f"See you{end}", [(after, False)] if after else []
    if family.startswith("phi"):  # its last token is after the whole text, not after each answer
        last, tail = f"{last}{after}<|endoftext|>", []
    prompts = [(beginning + prompt.format(first), False), (after + prompt.format("Bye"), False)]
    parts = [prompts[0], (f"Hello{end}", True), prompts[1], (last, True), *tail]
    assert_row(row, tokenizer, *parts)
    options = {"date_string": "26 Jul 2024"} if family == "llama32" else {}
    whole = tokenizer.apply_chat_template(messages, **options)
    assert row.input_ids.tolist() == whole["input_ids"]
    assert int(row.labels[row.labels != IGNORE][-1]) == tokenizer.eos_token_id
    alone = encoded(tokenizer, chat(messages, counted=[len(messages) - 1]))
    assert learned(tokenizer, alone) == last


CHARACTERS = st.characters(codec="utf-8", exclude_characters="<", exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
CONVERSATIONS = st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0)


@given(CONVERSATIONS, st.sampled_from(["chatml", "marks", "qwen3", "llama3", "gemma", "gemma3"]))
@settings(max_examples=40)
def test_a_prompt_is_what_a_generator_continues(texts, family):
    """The first tokens of the row are the tokens of the prompt alone, and the answer follows."""
    tokenizer = chat_tokenizer(family)
    messages = asked(*texts)

    row = encoded(tokenizer, chat(messages), train_on="last")

    alone = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert row.input_ids[: row.prompt_length].tolist() == alone["input_ids"]
    assert (row.labels[: row.prompt_length - 1] == IGNORE).all()
    answer = learned(tokenizer, row)
    assert answer.endswith(FAMILIES[family].end)
    assert texts[-1].strip() in answer
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row.input_ids.tolist()) == whole


NO_THINKING = {"enable_thinking": False}


@pytest.mark.parametrize(
    ("of_row", "of_task"),
    [({}, {}), ({"options": NO_THINKING}, {}), ({}, {"chat_template_kwargs": NO_THINKING})],
    ids=["default", "by row", "by task"],
)
def test_the_empty_thinking_of_qwen3_is_learned_unless_the_prompt_has_it(of_row, of_task):
    tokenizer = chat_tokenizer("qwen3")

    row = encoded(tokenizer, chat(asked("Hi", "Hello"), **of_row), **of_task)

    prompt, answer = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello<|im_end|>"
    if of_row or of_task:
        prompt += "<think>\n\n</think>\n\n"
    else:
        answer = f"<think>\n\n</think>\n\n{answer}"
    assert_row(row, tokenizer, (prompt, False), (answer, True), ("\n", False))


def test_tools_and_reasoning_of_an_answer_count():
    tokenizer = chat_tokenizer("qwen3")
    calling = {"role": "assistant", "reasoning_content": "I add.", "tool_calls": [CALL]}
    final = {"role": "assistant", "content": "<think>\nSo 4.\n</think>\n\nIt is 4."}

    row = encoded(tokenizer, chat([*asked("2 + 2?"), calling, RESULT, final], tools=[ADD]))

    options = {"tools": [ADD], "tokenize": False, "add_generation_prompt": True}
    beginning = tokenizer.apply_chat_template(asked("2 + 2?"), **options)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call><|im_end|>'
    response = "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>"
    assert_row(
        row,
        tokenizer,
        (beginning, False),
        ("<think>\nI add.\n</think>\n\n" + call, True),
        (f"\n{response}\n<|im_start|>assistant\n", False),
        ("<think>\nSo 4.\n</think>\n\nIt is 4.<|im_end|>", True),
        ("\n", False),
    )
    assert "# Tools" in beginning


@pytest.mark.parametrize("begin", ["<think>\nHm.\n</think>\n\n", "Hm.\n</think>\n\n", None])
def test_reasoning_is_stripped_on_request(begin):
    tokenizer = chat_tokenizer("qwen3")
    messages = asked("Hi", f"{begin or ''}Hello")
    if begin is None:
        messages[1]["reasoning_content"] = "Hm."

    whole = encoded(tokenizer, chat(messages))
    stripped = encoded(tokenizer, chat(messages), reasoning="strip")

    assert "Hm." in tokenizer.decode(whole.input_ids.tolist())
    assert plain(stripped) == plain(encoded(tokenizer, chat(asked("Hi", "Hello"))))


def test_answers_that_a_template_rewrites_later_have_rows_that_end_with_them():
    tokenizer = chat_tokenizer("qwen3")
    conversation = chat(asked("Hi", "Hello", "Bye", "See you"))
    first = chat(asked("Hi", "Hello"))

    [(rows, counts)] = ChatEncoder(tokenizer, task())([conversation], ["row 1"])
    last = encoded(tokenizer, conversation, train_on="last")

    thought = "<think>\n\n</think>\n\n"
    assert [learned(tokenizer, row) for row in rows] == [
        f"{thought}Hello<|im_end|>",
        f"{thought}See you<|im_end|>",
    ]
    assert [plain(row) for row in rows] == [plain(encoded(tokenizer, first)), plain(last)]
    assert (counts.rows, counts.kept, counts.rewritten, counts.parts) == (1, 2, 1, 1)
    assert counts.part_tokens == len(rows[0].input_ids)


def test_each_answer_has_a_row_on_request_and_answers_that_stay_share_one():
    tokenizer = chat_tokenizer("llama32")
    conversation = chat(asked("Hi", "Hello", "Bye", "See you"))

    rows = rows_of(tokenizer, conversation, train_on="each")

    assert len(rows_of(tokenizer, conversation)) == 1
    assert [learned(tokenizer, row) for row in rows] == ["Hello<|eot_id|>", "See you<|eot_id|>"]
    begun = chat(asked("Hi", "Hello"))
    assert plain(rows[0]) == plain(encoded(tokenizer, begun))


def test_calls_and_results_end_rows_of_their_own_where_the_template_rewrites_them():
    tokenizer = chat_tokenizer("qwen3")
    conversation = chat([*asked("Hi", "Hello"), *ROUND])

    texts = [learned(tokenizer, row) for row in rows_of(tokenizer, conversation)]

    for text, words in zip(texts, ("Hello", "<tool_call>", "It is 4."), strict=True):
        assert words in text
        assert text.endswith("<|im_end|>")


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name != "llama32"]
)  # writes a date
def test_each_answer_follows_what_the_template_asks_with(family):
    tokenizer = chat_tokenizer(family)
    messages = asked("Hi", "Hello", "Bye", "See you")

    rows = rows_of(tokenizer, chat(messages), train_on="each")

    for row, before in zip(rows, (messages[:1], messages[:3]), strict=True):
        prompt = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(row.input_ids[: row.prompt_length].tolist()) == prompt


def test_an_answer_is_learned_after_the_reasoning_of_calls_that_the_template_drops_with_it():
    """As gpt-oss: the reasoning of a call is read by the answer, and left out once it is there."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% set last = messages[-1].role == 'assistant' and not messages[-1].tool_calls %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls %}{% if not last %}{{ m.reasoning_content }}{% endif %}"
        "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [*asked("2 + 2?"), {**CALLING, "reasoning_content": "I add."}, RESULT, FOUR]

    row = encoded(tokenizer, chat(messages))

    assert learned(tokenizer, row) == "I add.add<|im_end|>It is 4.<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(row.input_ids.tolist()) == f"{prompt}It is 4.<|im_end|>"
    assert "I add." in prompt


def test_answers_that_contradict_the_generation_prompt_are_learned_and_counted():
    tokenizer = chat_tokenizer("qwen3")
    conversation = chat(asked("Hi", "<think>\nHm.\n</think>\n\nHello"))
    encoder = ChatEncoder(tokenizer, task(chat_template_kwargs=NO_THINKING))

    [([row], counts)] = encoder([conversation], ["row 1"])

    assert counts.begun == 1
    assert learned(tokenizer, row) == "Hm.\n</think>\n\nHello<|im_end|>"


CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}
FOUR = {"role": "assistant", "content": "It is 4."}
ROUND = [*asked("2 + 2?"), CALLING, RESULT, FOUR]
LOST = "leaves out a call of the tool 'add'"
# The family, the messages, what the message says, and the keys of the task.
REFUSED = {
    "system": ("gemma", asked("Hi", "Hello", system="Be kind"), "system.*System role not su", {}),
    "turns": ("gemma", [*asked("Hi"), *asked("Hi", "Hello")], "user, user.*must alternate", {}),
    "developer": (
        "qwen3",
        [{"role": "developer", "content": "Be kind"}, *asked("Hi", "Hello")],
        "developer.*leaves out|leaves out.*developer",
        {},
    ),
    # The answer would be learned, or read, as an empty answer.
    "call of a prompt": ("chatml", ROUND, LOST, {"train_on": "last"}),
    "call that counts": ("marks", ROUND, LOST, {"train_on": "all"}),
    # A template names the tools beside its marks, or writes the first call of a message alone.
    "tools": (
        "marks",
        [*asked("2 + 2?"), CALLING],
        LOST,
        {"template": "{{ tools | tojson }}" + template_of("marks")},
    ),
    "second call": (
        "chatml",
        [*asked("2 + 2?"), {**CALLING, "tool_calls": [CALL, CALL]}],
        LOST,
        {
            "template": "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}"
            "{{ m.tool_calls[0].function.name }}{% endif %}<|im_end|>{% endfor %}"
        },
    ),
    # The name of the tool stands elsewhere in the text.
    "call": ("chatml", [*asked("Please add 2 and 2"), CALLING], LOST, {}),
}


@pytest.mark.parametrize(("family", "messages", "reason", "keys"), REFUSED.values(), ids=REFUSED)
def test_what_a_template_cannot_write_is_refused_with_the_row(family, messages, reason, keys):
    tokenizer = chat_tokenizer(family)
    tokenizer.chat_template = keys.get("template", tokenizer.chat_template)
    options = {name: value for name, value in keys.items() if name != "template"}
    with pytest.raises(DataError, match=rf"(?s)row 1.*({reason})"):
        encoded(tokenizer, chat(messages, tools=[ADD]), **options)
    prompt = chat([*asked("2 + 2?"), CALLING, RESULT], counted=[])
    with pytest.raises(DataError, match=LOST):
        encoded(chat_tokenizer("chatml"), prompt)


# What the generation prompt writes, and how the first answers end: twins with and without marks.
TWINS = {
    "marks from the header on": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>"
        "assistant\n{{ m.content }}<|im_end|>{% endgeneration %}{% else %}<|im_start|>"
        "{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>assistant\n", "<|im_end|>", "<|im_end|>", "\n"),
    ),
    "marks from inside the prompt on": (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% generation %}<think>\n{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        ("<|im_start|>assistant\n<think>\n", "<|im_end|>", "<|im_end|>", "\n"),
    ),
    "another end after the last answer": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% if loop.last %}<|im_end|>{% else %}<|endoftext|>"
        "{% endif %}{% endgeneration %}{% else %}{{ m.content }}<|endoftext|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>assistant\n", "<|endoftext|>", "<|im_end|>", ""),
    ),
}


@pytest.mark.parametrize("has_marks", [True, False], ids=["marks", "no marks"])
@pytest.mark.parametrize("name", TWINS)
@given(contents=st.lists(TEXTS.map(str.strip), min_size=4, max_size=4))
@settings(max_examples=10)
def test_every_answer_counts_from_the_end_of_its_prompt_up_to_its_end(name, has_marks, contents):
    template, (header, end, last, after) = TWINS[name]
    tokenizer = chat_tokenizer("chatml")
    marks = r"\{%-? (end)?generation %\}"
    tokenizer.chat_template = template if has_marks else re.sub(marks, "", template)

    row = encoded(tokenizer, chat(asked(*contents)))

    user = "<|im_start|>user\n{}" + (end if after == "" else "<|im_end|>\n") + header
    prompts = [user.format(contents[0]), after + user.format(contents[2])]
    answers = [contents[1] + end, contents[3] + last]
    parts = [(prompts[0], False), (answers[0], True), (prompts[1], False), (answers[1], True)]
    assert_row(row, tokenizer, *parts, *([(after, False)] if after else []))
    prompt = tokenizer.apply_chat_template(asked(*contents[:3]), add_generation_prompt=True)
    assert row.input_ids[: row.prompt_length].tolist() == prompt["input_ids"]


def test_a_prompt_that_is_not_in_the_text_ends_with_the_last_token_of_the_template_in_both():
    """DeepSeek's prompts begin reasoning, and its training template marks the header too."""
    tokenizer = chat_tokenizer("deepseek", merges=False)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|Assistant|>"
        "{{ m.content }}<|end_of_sentence|>{% endgeneration %}{% else %}<|User|>{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>{% endif %}"
    )

    row = encoded(tokenizer, chat(asked("Hi", "Hello", "Bye", "See you")))

    answers = [(f"{text}<|end_of_sentence|>", True) for text in ("Hello", "See you")]
    headers = [(f"<|User|>{text}<|Assistant|>", False) for text in ("Hi", "Bye")]
    assert_row(row, tokenizer, headers[0], answers[0], headers[1], answers[1])


@pytest.mark.parametrize(("prompt", "completion"), [("Q\n", "\nA"), ("the c", "at sees")])
def test_no_token_reaches_over_the_end_of_the_prompt(prompt, completion):
    """The tokenizer would join both; a generator continues the tokens of the prompt alone."""
    tokenizer = chat_tokenizer("chatml")
    joined = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]

    row = encoded(tokenizer, Conversation(prompt=prompt, completion=completion))

    assert_row(row, tokenizer, (prompt, False), (completion + "<|im_end|>", True))
    assert row.input_ids[:-1].tolist() != joined


def test_a_tokenizer_that_cannot_cut_the_text_at_the_answer_is_refused_with_the_row():
    """Metaspace puts a space before every part, so that the parts are another text."""
    pieces = [("<unk>", 0.0), ("▁unhappy", -1.0), ("▁un", -2.0), ("▁happy", -2.0), ("</s>", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")  # noqa: S106

    row = encoded(tokenizer, Conversation(prompt="un", completion=" happy"))
    with pytest.raises(DataError, match=r"row 1.*joins 'un' with 'happy'"):
        encoded(tokenizer, Conversation(prompt="un", completion="happy"))

    assert row.input_ids.tolist() == [2, 3, 4]
    assert row.labels.tolist() == [3, 4, IGNORE]


@pytest.mark.parametrize("family", ["chatml", "marks", "gemma", "llama3", "phi3"])
def test_of_an_answer_that_was_cut_off_the_end_does_not_count(family):
    tokenizer = chat_tokenizer(family)
    messages = asked("Hi", "Hello", "Bye", "See you lat")

    cut = encoded(tokenizer, chat(messages, is_cut=True))

    whole = encoded(tokenizer, chat(messages))
    assert cut.input_ids.tolist() == whole.input_ids.tolist()
    assert learned(tokenizer, whole).startswith(learned(tokenizer, cut))
    assert learned(tokenizer, cut).endswith("See you lat")


def test_a_completion_that_was_cut_off_has_no_end():
    tokenizer = chat_tokenizer("chatml")
    row = encoded(tokenizer, Conversation(prompt="2 + 2 =", completion=" 4 beca", is_cut=True))

    assert tokenizer.decode(row.input_ids.tolist()) == "2 + 2 = 4 beca"
    assert learned(tokenizer, row) == " 4 beca"


@pytest.mark.parametrize("turns", [{"prompt": "2 + 2"}, {"messages": asked("2 + 2")}])
def test_a_prompt_alone_has_no_labels(turns):
    tokenizer = chat_tokenizer("chatml")

    row = encoded(tokenizer, Conversation(**turns))

    assert row.prompt_length == len(row.input_ids)
    assert (row.labels == IGNORE).all()
    end = "2 + 2" if "prompt" in turns else "<|im_start|>assistant\n"
    assert tokenizer.decode(row.input_ids.tolist()).endswith(end)


def test_a_line_break_that_ends_an_answer_without_an_end_token_counts():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )

    row = encoded(tokenizer, chat(asked("Hi", "Hello", "Bye", "See you")))

    assert learned(tokenizer, row) == "Hello\nSee you\n"


def test_a_document_loses_no_target():
    tokenizer = chat_tokenizer("chatml", merges=False)
    document = Conversation(completion="abcdefgh")
    [(rows, counts)] = ChatEncoder(tokenizer, task(max_length=4))([document], ["row 1"])

    targets = np.concatenate([row.labels[row.labels != IGNORE] for row in rows])
    assert tokenizer.decode(targets.tolist()) == "bcdefgh<|im_end|>"
    assert [row.prompt_length for row in rows] == [0] * len(rows)
    assert counts.targets == len(targets)


@pytest.mark.parametrize(
    ("arguments", "content"), [('{"a":2, "b": 2}', ""), ({"a": 2, "b": 2}, None)]
)
def test_calls_of_deepseek_have_their_arguments_as_json_text(arguments, content):
    tokenizer = chat_tokenizer("deepseek")
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    calling = {"role": "assistant", "content": content, "tool_calls": [call, call]}
    messages = [*asked("2 + 2?"), calling, RESULT, FOUR]

    row = encoded(tokenizer, chat(messages))

    text = arguments if isinstance(arguments, str) else '{"a": 2, "b": 2}'
    written = f"<|tool_call_begin|>function<|tool_sep|>add\n```json\n{text}\n```<|tool_call_end|>"
    end = "<|end_of_sentence|>"
    assert_row(
        row,
        tokenizer,
        ("<|begin_of_sentence|><|User|>2 + 2?<|Assistant|>", False),
        (f"<|tool_calls_begin|>{written}{written}<|tool_calls_end|>{end}", True),
        ("<|tool_outputs_begin|><|tool_output_begin|>4<|tool_output_end|>", False),
        ("<|tool_outputs_end|>", False),
        (f"It is 4.{end}", True),
    )
    if content == "":
        assert row.input_ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
