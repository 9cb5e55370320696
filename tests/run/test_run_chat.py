"""Whole runs on conversations: learned, logged, continued in the report, scored alone."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import asked, chat_tokenizer
from tiny_runs import config_tree, llama, write_config, write_jsonl
from whole_run import finish, read, same_weights


def questions(shared_data: Path) -> list[dict[str, str]]:
    with (shared_data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, 40)]


def write_run(folder: Path, rows: list[dict[str, Any]], out: str, **task: Any) -> Path:
    chat_tokenizer("chatml").save_pretrained(folder / "tokenizer")
    path = write_jsonl(folder / "rows.jsonl", rows)
    data = {"type": "causal_lm", "dataset": str(path), "tokenizer": str(folder / "tokenizer")}
    model = llama(1, max_position_embeddings=512)
    tree = config_tree(
        folder / out,
        {**data, "max_length": 512, **task},
        teacher={"model": model, "finetune": {"max_steps": 2}},
        student={"model": model},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}, {"loss": "hard_cross_entropy"}],
    )
    return write_config(folder / f"{out}.yaml", tree)


def test_a_run_on_real_questions_learns_and_says_what_counts(one_rank, tmp_path, shared_data):
    rows = [
        {"messages": asked(pair["question"], pair["answer"])} for pair in questions(shared_data)
    ]
    config = write_run(tmp_path, rows, "out")

    outcome = finish(one_rank, config)

    report = read(tmp_path / "out")
    assert report["student.perplexity"] > 1
    assert report["samples"][0]["prompt"].rstrip().endswith("assistant")
    log = outcome.out + outcome.err
    for words in ("train: ", "validation: ", " conversations, ", " % count", "[[Natalia sold 48/2"):
        assert words in log
    assert "<|im_end|>]]" in log


def test_a_mixture_tells_its_sources_and_scores_documents_as_a_file_of_them_alone(
    one_rank, tmp_path
):
    chats = [{"messages": asked(f"Question {n}?", f"It is {n}.")} for n in range(12)]
    texts = [{"text": f"The number after {n} is {n + 1}."} for n in range(6)]
    files = {"chats": chats, "texts": texts}
    mixture = {
        name: {"files": str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), "weight": weight}
        for (name, rows), weight in zip(files.items(), (0.6, 0.4), strict=True)
    }
    held = str(write_jsonl(tmp_path / "held.jsonl", chats[:3]))
    documents = [
        {"text": f"The numbers after {n} are " + " ".join(map(str, range(n, n + 60)))}
        for n in range(4)
    ]
    long = str(write_jsonl(tmp_path / "long.jsonl", documents))
    keys = {"dataset": None, "mixture": mixture, "validation_files": held, "max_length": 64}
    keys["evaluation_sets"] = {"long": long}
    config = write_run(tmp_path, chats, "out", **keys)

    answer = finish(one_rank, config)

    assert (
        len(re.findall(r"^train/\w+: \d+ conversations", answer.out + answer.err, re.MULTILINE))
        == 2
    )
    # Documents are cut, not packed, also where a file of them is scored alone.
    alone = json.loads(one_rank.megakd("evaluate", config, "--data", long, "--json").out)
    (student,) = (
        row for row in read(tmp_path / "out")["evaluation_sets"] if row["model"] == "student"
    )
    assert alone["metrics"] == pytest.approx({name: student[name] for name in alone["metrics"]})
    # The card shows a chat, which runs with plain transformers.
    final = tmp_path / "out" / "final"
    example = (final / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    names: dict[str, Any] = {"folder": str(final)}
    exec(example.replace("max_new_tokens=200", "max_new_tokens=2"), names)  # noqa: S102
    assert names["chat"].model.config.model_type == "llama"


@pytest.mark.parametrize(
    "keys", [{"streaming": True, "max_eval_examples": 4, "max_length": 64}, {"max_length": None}]
)
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(one_rank, tmp_path, keys):
    rows = [{"messages": asked(f"Question {n}?", f"It is {n}.")} for n in range(24)]
    whole = write_run(tmp_path, rows, "whole", **keys)
    stopped = write_run(tmp_path, rows, "stopped", **keys)

    finish(one_rank, whole)
    first = one_rank.train("--config", stopped, "save.save_steps=1", stop_at=("student", 2))
    assert first.code != 0
    finish(one_rank, stopped, "save.save_steps=1")
    again = finish(one_rank, stopped, "save.save_steps=1")
    assert "encoding" not in again.out + again.err  # the run is known as finished

    assert same_weights(tmp_path / "whole" / "final", tmp_path / "stopped" / "final")


PROMPTS = [{"prompt": f"Question {n}?", "response": f"It is {n}."} for n in range(12)]


@pytest.mark.parametrize("source", ["file", "stream", "mixture"])
def test_prompts_whose_answers_no_column_holds_are_refused(one_rank, tmp_path, source):
    rows = [{"messages": asked(f"Question {n}?", f"It is {n}.")} for n in range(12)]
    keys: dict[str, Any] = {}
    if source == "stream":
        keys = {"streaming": True, "max_eval_examples": 4}
    if source == "mixture":
        chats, maths = (
            write_jsonl(tmp_path / f"{n}.jsonl", r) for n, r in ((1, rows), (2, PROMPTS))
        )
        held = str(write_jsonl(tmp_path / "held.jsonl", rows[:2]))
        parts = {n: {"files": str(f), "weight": 1} for n, f in (("chats", chats), ("maths", maths))}
        keys = {"dataset": None, "mixture": parts, "validation_files": held}

    outcome = one_rank.train("--config", write_run(tmp_path, PROMPTS, "out", **keys), code=2)

    rows_of = "the training rows of task.mixture.maths" if source == "mixture" else "training rows"
    assert f"{rows_of} are prompts without an answer" in outcome.err
    assert not outcome.loaded
