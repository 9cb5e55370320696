"""Rows of families of chat models whose templates rewrite messages or leave parts of them out."""

from __future__ import annotations

import pytest
from chat_tokenizers import asked, chat_tokenizer
from encoded_chats import ADD, CALL, assert_row, chat, encoded

from megakd.errors import DataError

CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4"}
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def llama(role: str, content: str) -> str:
    """A message as Llama 3 writes it."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


def test_gemma_3_writes_the_system_message_into_the_first_question():
    tokenizer = chat_tokenizer("gemma3")

    row = encoded(tokenizer, chat(asked("Hi", "Hello", system="Be kind")))

    prompt = "<bos><start_of_turn>user\nBe kind\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert_row(row, tokenizer, (prompt, False), ("Hello<end_of_turn>", True), ("\n", False))


@pytest.mark.parametrize("system", [None, "Be kind"])
def test_llama_writes_a_system_message_with_a_date_that_is_always_the_same(system):
    tokenizer = chat_tokenizer("llama32")
    messages = asked("Hi", "Hello", "Bye", "See you", system=system)

    row = encoded(tokenizer, chat(messages))

    answer = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    begun = "<|begin_of_text|>" + llama("system", DATES + (system or "")) + llama("user", "Hi")
    assert_row(
        row,
        tokenizer,
        (begun + answer, False),
        ("Hello<|eot_id|>", True),
        (llama("user", "Bye") + answer, False),
        ("See you<|eot_id|>", True),
    )
    alone = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, date_string="26 Jul 2024"
    )
    assert row.input_ids[: row.prompt_length].tolist() == alone["input_ids"]


def test_a_call_of_llama_counts_and_its_result_does_not():
    tokenizer = chat_tokenizer("llama32")
    messages = [*asked("2 + 2?"), CALLING, RESULT, {"role": "assistant", "content": "It is 4."}]

    row = encoded(tokenizer, chat(messages, tools=[ADD]))

    beginning = tokenizer.apply_chat_template(
        messages[:1],
        tools=[ADD],
        tokenize=False,
        add_generation_prompt=True,
        date_string="26 Jul 2024",
    )
    result = llama("ipython", '"4"') + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert_row(
        row,
        tokenizer,
        (beginning, False),
        ('{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>', True),
        (result, False),
        ("It is 4.<|eot_id|>", True),
    )


@pytest.mark.parametrize("train_on", ["all", "last"])
@pytest.mark.parametrize("family", ["chatml", "marks", "llama3"])
def test_a_template_that_leaves_out_calls_is_refused_with_the_row_and_the_tool(family, train_on):
    """The answer would be learned, or read, as an empty answer."""
    messages = [*asked("2 + 2?"), CALLING, RESULT, {"role": "assistant", "content": "It is 4."}]

    with pytest.raises(DataError, match=r"row 1: .* leaves out a call of the tool 'add'"):
        encoded(chat_tokenizer(family), chat(messages, tools=[ADD]), train_on=train_on)


def test_the_name_of_a_tool_elsewhere_in_the_text_does_not_hide_a_lost_call():
    messages = [*asked("Please add 2 and 2"), CALLING]

    with pytest.raises(DataError, match="leaves out a call of the tool 'add'"):
        encoded(chat_tokenizer("chatml"), chat(messages))


@pytest.mark.parametrize(("family", "line"), [("phi3", "\n"), ("phi4_mini", "")])
def test_every_answer_of_phi_counts_and_the_text_is_that_of_transformers(family, line):
    """The template writes its last token after the whole text, and not after each answer."""
    tokenizer = chat_tokenizer(family)
    messages = asked("Hi", "Hello", "Bye", "See you", system="Be kind")

    row = encoded(tokenizer, chat(messages))

    def turn(role: str, content: str) -> str:
        return f"<|{role}|>{line}{content}<|end|>{line}"

    prompt = f"<|assistant|>{line}"
    assert_row(
        row,
        tokenizer,
        (turn("system", "Be kind") + turn("user", "Hi") + prompt, False),
        ("Hello<|end|>", True),
        (line + turn("user", "Bye") + prompt, False),
        (f"See you<|end|>{line}<|endoftext|>", True),
    )
    assert row.input_ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("arguments", ['{"a":2, "b": 2}', {"a": 2, "b": 2}])
@pytest.mark.parametrize("content", [None, ""])
def test_calls_of_deepseek_have_their_arguments_as_json_text(arguments, content):
    tokenizer = chat_tokenizer("deepseek")
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    calling = {"role": "assistant", "content": content, "tool_calls": [call, call]}
    messages = [*asked("2 + 2?"), calling, RESULT, {"role": "assistant", "content": "It is 4."}]

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
    if content == "" and isinstance(arguments, str):
        assert row.input_ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
