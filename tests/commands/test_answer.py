"""`megakd answer`: a teacher's texts for prompts, from its weights or from an API."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tiny_runs import write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megakd import cli
from megakd.commands.answer import read_prompts
from megakd.config.file import config_of
from megakd.data.splits import load_splits
from megakd.errors import DataError

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
    words += ["--rows_at_once=2", "--temperature=1"]

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
def api(reply: dict[str, Any], asked: list[Any]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            text = json.dumps(reply).encode()
            self.send_response(200)
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


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"message": {"content": "one"}}, "choices.0.finish_reason: Field required"),
        (
            {"message": {"content": None, "reasoning": "one"}, "finish_reason": "length"},
            "finish_reason length has no content; start vLLM without --reasoning-parser",
        ),
    ],
)
def test_an_api_without_texts_or_finish_reasons_is_refused(tmp_path, capsys, choice, message):
    prompts, to = write_jsonl(tmp_path / "prompts.jsonl", QUESTIONS), tmp_path / "answers.jsonl"

    with api({"choices": [choice]}, []) as url:
        code = cli.main(["answer", "gpt", f"--data={prompts}", f"--to={to}", f"--url={url}"])

    assert code == 2
    assert message in capsys.readouterr().err
    assert to.read_text() == ""


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

    assert [row[0]["content"] for row in read_prompts(table)] == ["Sort.\n\nb, a", "Greet."]
    assert read_prompts(shared) == [[{"role": "user", "content": "a"}]]


def test_the_last_answer_of_a_conversation_is_left_out(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"messages": [*turns, *turns]}])

    assert read_prompts(path) == [[*turns, turns[0]]]
