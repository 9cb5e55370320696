"""`megakd answer`: a teacher's texts for prompts, from its weights or from an API."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest
import torch
from tiny_runs import write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megakd import cli
from megakd.commands.answer import read_prompts
from megakd.config.file import config_of
from megakd.data.conversations import ChatColumns, conversation_of
from megakd.data.readers import files_table
from megakd.data.records import Record
from megakd.data.splits import load_splits
from megakd.errors import DataError, ServerError
from megakd.models import generation
from megakd.models.generation import Completion
from megakd.teachers.servers import JsonServer, Reply

UNKNOWN = "<unk>"
WORDS = [UNKNOWN, "<pad>", "</s>", "user", "assistant", "what", "is", "a", "model"]
WORDS += ["small", "large", "one"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ANSWER = "one\u2028two"  # ends a line for Python, but not for JSON
QUESTIONS = [{"question": f"what is a {word} model"} for word in ("small", "large", "one")]


@pytest.fixture(autouse=True)
def level() -> Iterator[None]:
    """The level of the log, which a command sets for its process."""
    logger = logging.getLogger("megakd")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS), num_hidden_layers=1, max_position_embeddings=64, **sizes
    )
    folder = tmp_path / "teacher"
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_answers_of_weights_are_conversations_that_a_run_reads_and_go_on_after_a_kill(
    teacher, tmp_path, capsys
):
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", QUESTIONS), tmp_path / "answers.jsonl"
    words = ["answer", str(teacher), f"--data={prompts}", f"--to={to}", "--max_new_tokens=5"]
    words += ["--rows_at_once=2", "--temperature=1", "--seed=3"]

    assert cli.main(words) == 0

    whole, rows = to.read_text(encoding="utf-8"), rows_of(to)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    told = f"{to}: 3 answers, of which {cut} reached --max_new_tokens\n"
    assert capsys.readouterr().out == told
    assert [row["messages"][0]["content"] for row in rows] == [q["question"] for q in QUESTIONS]
    assert {row["messages"][1]["role"] for row in rows} == {"assistant"}
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert rows[0]["sampling"]["temperature"] == 1.0

    to.write_text(whole[: whole.index("\n") + 20], encoding="utf-8")  # killed in the second line
    assert cli.main(words) == 0
    assert to.read_text(encoding="utf-8") == whole
    assert cli.main(words) == 0  # nothing is left to do
    assert to.read_text(encoding="utf-8") == whole

    assert cli.main([*words, "--seed=7"]) == 2
    assert "line 1 is of other settings" in capsys.readouterr().err

    task = {"type": "causal_lm", "dataset": str(to), "max_length": 64}
    tree = {"output_dir": "out", "task": task, "student": {"model": str(teacher)}}
    config = config_of({**tree, "method": {"name": "finetune"}})
    splits = load_splits(config.task, seed=0, cache_dir=tmp_path / "cache")
    assert len(splits.train) + len(splits.validation) == 3


@contextmanager
def api(reply: dict[str, Any], asked: list[Any], others: Any = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            status, tree = (others or {}).get(body["messages"][-1]["content"], (200, reply))
            text = tree.encode() if isinstance(tree, str) else json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_an_api_is_asked_with_its_key_and_its_reasons_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", QUESTIONS), tmp_path / "answers.jsonl"
    asked: list[Any] = []
    choice = {"message": {"role": "assistant", "content": ANSWER}, "finish_reason": "length"}

    with api({"choices": [choice]}, asked) as url:
        words = ["answer", "gpt", f"--data={prompts}", f"--to={to}", f"--url={url}"]
        codes = [cli.main(words), cli.main(words)]

    assert codes == [0, 0]
    assert len(asked) == len(QUESTIONS)
    assert [row["messages"][1]["content"] for row in rows_of(to)] == [ANSWER] * 3
    assert {row["finish_reason"] for row in rows_of(to)} == {"length"}
    assert {(path, key) for path, key, _ in asked} == {("/v1/chat/completions", "Bearer secret")}
    assert {body["model"] for *_, body in asked} == {"gpt"}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
GOOD = {"choices": [{"message": {"content": "good"}, "finish_reason": "stop"}]}


def ended(reason: str, **message: Any) -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": None, **message}, "finish_reason": reason}]}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((200, {"choices": [{"message": {"content": "one"}}]}), "finish_reason: Field required"),
        (ended("length", reasoning="one"), "3 reasoning without a text within --max_new_tokens"),
        ((400, "max_tokens is unknown"), "(3 refused): prompt 1 is left out: refused: POST"),
        ((404, "no such model"), "answered 404: no such model"),
    ],
)
def test_an_api_that_answers_no_prompt_is_an_error(tmp_path, capsys, reply, message):
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", QUESTIONS), tmp_path / "answers.jsonl"

    with api({}, [], dict.fromkeys((row["question"] for row in QUESTIONS), reply)) as url:
        code = cli.main(["answer", "gpt", f"--data={prompts}", f"--to={to}", f"--url={url}"])

    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "vLLM" not in error
    assert to.read_text() == ""


@pytest.mark.parametrize(
    ("status", "code", "most"),
    [(400, 0, 41), (500, 0, 41), (401, 2, 16), (404, 2, 16)],  # the last two hold for all prompts
)
def test_prompts_after_many_that_are_refused_are_answered(tmp_path, status, code, most):
    rows = [{"prompt": f"p{n}"} for n in range(41)]
    prompts, to, asked = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "a.jsonl", list[Any]()

    with api(GOOD, asked, {f"p{n}": (status, "no") for n in range(40)}) as url:
        words = ["answer", "gpt", f"--data={prompts}", f"--to={to}", f"--url={url}"]
        assert cli.main([*words, "--rows_at_once=16"]) == code

    assert len(asked) == most
    assert [row["messages"][0]["content"] for row in rows_of(to)] == ["p40"][code:]


def test_a_prompt_without_a_reply_is_left_out_while_others_are_answered(
    tmp_path, monkeypatch, capsys
):
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", QUESTIONS), tmp_path / "answers.jsonl"
    question = QUESTIONS[1]["question"]

    def ask(_: Any, __: str, body: Any) -> Reply:
        if body["messages"][-1]["content"] == question:
            raise ServerError("no answer within 600 s")
        return Reply(200, json.dumps(GOOD), "POST")

    monkeypatch.setattr(JsonServer, "ask", ask)
    words = ["answer", "gpt", f"--data={prompts}", f"--to={to}", "--url=http://a:1"]
    first, again = cli.main(words), cli.main(words)

    out, error = capsys.readouterr()
    assert (first, again) == (0, 2)  # the second start asks that prompt alone
    assert "2 answers, of which 0 reached --max_new_tokens; left out, and asked again" in out
    assert "1 without a reply" in out
    assert "error: no answer within 600 s" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--system= "], "--system is empty; give it a text, or leave it out"),
        (["--temperature=nan"], "--temperature at least 0"),
        (["--temperature=inf"], "--temperature at least 0"),
        (["--top_p=nan"], "--top_p above 0 and at most 1"),
    ],
)
def test_settings_without_a_meaning_are_refused_before_any_prompt_is_asked(
    tmp_path, capsys, words, message
):
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", QUESTIONS), tmp_path / "answers.jsonl"
    given = ["answer", "gpt", f"--data={prompts}", f"--to={to}", "--url=http://a:1", *words]

    assert cli.main(given) == 2

    assert message in capsys.readouterr().err
    assert not to.exists()


LEFT_OUT = {
    "filter": (ended("content_filter", content="half of"), "finish_reason content_filter"),
    "abort": (ended("abort", content="half of"), "finish_reason abort"),
    "empty": (ended("stop", content=" "), "no text"),
    "thought": (ended("stop", content="", reasoning_content="hm"), "reasoning without a text"),
    "open": (ended("stop", content="<think>hm"), "reasoning without a text"),
    "cut": (ended("length", content="<think>hm"), "reasoning without a text within"),
    "marked": (ended("stop", content="<think>hm</think>\n"), "reasoning without a text"),
    "refusal": (ended("stop", refusal="I cannot"), "a refusal"),
    "no call": (ended("tool_calls", tool_calls=[]), "no text"),
    "half a call": (ended("length", tool_calls=[CALL]), "no text within --max_new_tokens"),
    "too long": ((400, "the context has 16 tokens"), "refused"),
    "moderated": ((403, "flagged"), "refused"),
    "no choice": ((200, {"choices": []}), "without a readable answer"),
    "no json": ((200, '{"choices"'), "without a readable answer"),
    "surrogate": (ended("stop", content="\ud800"), "without a readable answer"),
    "bad call": (
        ended("tool_calls", tool_calls=[{"function": {"name": "f", "arguments": "{a"}}]),
        "without a readable answer",
    ),
}


def test_prompts_without_an_answer_are_counted_by_reason_and_asked_again(tmp_path, capsys):
    # Each is followed by one with an answer, which occurs more than once.
    rows = [{"prompt": text} for name in LEFT_OUT for text in (name, "good")]
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    others, asked = {name: reply for name, (reply, _) in LEFT_OUT.items()}, list[Any]()
    count = len(LEFT_OUT)
    with api(GOOD, asked, others) as url:
        words = ["answer", "gpt", f"--data={prompts}", f"--to={to}", f"--url={url}"]
        words += ["--rows_at_once=4"]
        first, line = cli.main(words), capsys.readouterr().out
        again, same = cli.main(words), capsys.readouterr().out
        del others["filter"]
        cli.main(words)

    assert (first, again) == (0, 0)
    assert line == same
    assert line.startswith(
        f"{to}: {count} answers, of which 0 reached --max_new_tokens; left out, and asked again "
        "by the same command: 1 finish_reason content_filter, "
    )
    counts = Counter(reason for _, reason in LEFT_OUT.values())
    assert all(f"{number} {reason}" in line for reason, number in counts.items())
    assert len(asked) == 4 * count
    assert [row["messages"][0]["content"] for row in rows_of(to)] == ["good"] * count + ["filter"]


def test_tools_and_options_of_a_row_are_asked_kept_and_told_apart(tmp_path, capsys):
    other = {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}, "id": 7}
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [CALL]}]
    turns += [{"role": "tool", "content": "go on"}]
    rows = [{"prompt": "go"}, {"prompt": "go", **other}, {"prompt": turns, **other}]
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    _, called = ended("tool_calls", tool_calls=[CALL], reasoning="hm", audio=None)
    asked = list[Any]()
    with api(called, asked) as url:
        words = ["answer", "gpt", f"--data={prompts}", f"--to={to}", f"--url={url}"]
        words += ["--top_p=0.5", "--rows_at_once=1"]
        assert [cli.main(words), cli.main(words)] == [0, 0]
        assert cli.main([*words, "--top_p=0.6"]) == 2
        assert "is of other settings" in capsys.readouterr().err
        write_jsonl(prompts, [rows[0], rows[2], {**rows[1], "tools": []}])
        assert cli.main(words) == 2
        assert "line 2 is of other prompts" in capsys.readouterr().err

    written, bodies = rows_of(to), [body for *_, body in asked]
    assert [body.get("tools") for body in bodies] == [None, TOOLS, TOOLS]
    assert bodies[1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert {body["top_p"] for body in bodies} == {0.5}
    assert bodies[2]["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert [{*row} - {"messages", "sampling", "finish_reason"} for row in written] == [
        set(),
        {"tools", "chat_template_kwargs"},
        {"tools", "chat_template_kwargs"},
    ]
    assert {row["finish_reason"] for row in written} == {"tool_calls"}
    said = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]}
    assert [row["messages"][-1] for row in written] == [said] * 3
    columns, records = ChatColumns(messages="messages"), files_table([to], "answers").records()
    read = [conversation_of("answers", columns, cast("Record", row)).tools for row in records]
    assert read == [None, TOOLS, TOOLS]  # as training reads them


def test_calls_without_arguments_and_reasoning_that_is_no_text_are_written_as_training_reads_them(
    tmp_path,
):
    def called(arguments: str | None) -> tuple[int, object]:
        call = {"function": {"name": "f", "arguments": arguments}}
        return ended("tool_calls", tool_calls=[call], reasoning_content=["hm"], thinking="aha")

    rows = [{"prompt": "empty"}, {"prompt": "null"}]
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"
    with api({}, [], {"empty": called(""), "null": called(None)}) as url:
        assert cli.main(["answer", "gpt", f"--data={prompts}", f"--to={to}", f"--url={url}"]) == 0

    for row in rows_of(to):
        answer = row["messages"][-1]
        assert answer["tool_calls"][0]["function"]["arguments"] == "{}"
        assert answer["reasoning_content"] == "aha"


def test_weights_read_tools_and_leave_out_what_does_not_fit(teacher, tmp_path, capsys, monkeypatch):
    asked = list[str]()
    template = "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}" + TEMPLATE
    (teacher / "chat_template.jinja").write_text(template + "{{ mood }}")
    rows = [{"prompt": "what"}, {"prompt": "what " * 70}]
    rows += [{"prompt": "small", "tools": TOOLS, "chat_template_kwargs": {"mood": "one"}}]
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", rows), tmp_path / "answers.jsonl"

    def complete(_: Any, ids: Any, *__: Any, **___: Any) -> list[Completion]:
        asked.extend(" ".join(WORDS[token] for token in one) for one in ids)
        return [Completion((WORDS.index("large"),), finished=True) for _ in ids]

    monkeypatch.setattr(generation, "complete", complete)
    code = cli.main(
        ["answer", str(teacher), f"--data={prompts}", f"--to={to}", "--max_new_tokens=2"]
    )

    assert code == 0
    assert asked == ["user what </s> assistant", "<unk> user small </s> assistant one"]
    assert [row["messages"][-1]["content"] for row in rows_of(to)] == ["large", "large"]
    assert rows_of(to)[1]["tools"] == TOOLS
    assert "2 answers, of which 0 reached --max_new_tokens; left out, " in capsys.readouterr().out


def test_tools_that_the_template_of_weights_leaves_out_are_not_answered(teacher, tmp_path, capsys):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "what", "tools": TOOLS}])
    words = ["answer", str(teacher), f"--data={prompts}", f"--to={tmp_path / 'new/a.jsonl'}"]

    assert cli.main([*words, "--max_new_tokens=2"]) == 2

    assert "the chat template of the teacher leaves out the tools" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": "b"}, "holds no conversations: a row has messages, .* text, label"),
        ({"messages": "hello"}, "line 1: column 'messages' must be a list of messages with role"),
        ({"question": None}, "line 1: column 'question' is missing"),
        ({"messages": [{"role": "system", "content": "be brief"}]}, "no turn of the user"),
    ],
)
def test_rows_that_are_no_prompts_are_refused(tmp_path, row, message):
    path = write_jsonl(tmp_path / "prompts.jsonl", [row])

    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_tables_and_sharegpt_are_prompts_too(tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text('instruction,input\nSort.,"b, a"\nGreet.,\n', encoding="utf-8")
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    shared = write_jsonl(tmp_path / "prompts.jsonl", [{"conversations": turns}])

    assert [row.text for row in read_prompts(table)] == ["Sort.\n\nb, a", "Greet."]
    assert [row.messages for row in read_prompts(shared)] == [[{"role": "user", "content": "a"}]]


def test_the_last_answer_of_a_conversation_is_left_out(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"messages": [*turns, *turns]}])

    assert [row.messages for row in read_prompts(path)] == [[*turns, turns[0]]]


def test_a_system_message_goes_before_prompts_that_have_none(tmp_path):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"messages": own}, {"messages": own[1:]}])

    first, second = read_prompts(path, system="be brief")

    assert first.messages == own
    assert second.messages == [{"role": "system", "content": "be brief"}, own[1]]
