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

CHATS = [{"messages": asked(f"Question {n}?", f"It is {n}.")} for n in range(24)]


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
    with (shared_data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        questions = [json.loads(line) for line in islice(file, 40)]
    rows = [{"messages": asked(pair["question"], pair["answer"])} for pair in questions]

    outcome = finish(one_rank, write_run(tmp_path, rows, "out"))

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
    counts = [" ".join(map(str, range(n, n + 60))) for n in range(4)]
    rows = {
        "chats": CHATS,
        "texts": [{"text": f"The number after {n} is {n + 1}."} for n in range(6)],
        "held": CHATS[:3],
        "long": [{"text": f"The numbers after {n} are {c}"} for n, c in enumerate(counts)],
    }
    files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", r)) for name, r in rows.items()}
    mixture = {name: {"files": files[name], "weight": 0.5} for name in ("chats", "texts")}
    keys = {"mixture": mixture, "validation_files": files["held"], "max_length": 64}
    keys["evaluation_sets"] = {"long": files["long"]}
    config = write_run(tmp_path, CHATS, "out", dataset=None, **keys)

    answer = finish(one_rank, config)

    sources = re.findall(r"^train/\w+: \d+ (?:conv|doc)", answer.out + answer.err, re.MULTILINE)
    assert len(sources) == 2
    # Documents are cut, not packed, also where a file of them is scored alone.
    words = ("--data", files["long"], "--json")
    alone = json.loads(one_rank.megakd("evaluate", config, *words).out)["metrics"]
    scores = {row["model"]: row for row in read(tmp_path / "out")["evaluation_sets"]}
    assert alone == pytest.approx({name: scores["student"][name] for name in alone})
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
    whole, stopped = (write_run(tmp_path, CHATS, name, **keys) for name in ("whole", "stopped"))

    finish(one_rank, whole)
    first = one_rank.train("--config", stopped, stop_at=("student", 2))
    assert first.code != 0
    finish(one_rank, stopped)
    again = finish(one_rank, stopped)
    assert "encoding" not in again.out + again.err  # the run is known as finished

    assert same_weights(tmp_path / "whole" / "final", tmp_path / "stopped" / "final")


@pytest.mark.parametrize("source", ["stream", "mixture"])
def test_prompts_whose_answers_no_column_holds_are_refused(one_rank, tmp_path, source):
    prompts = [{"prompt": f"Question {n}?", "response": f"It is {n}."} for n in range(12)]
    keys: dict[str, Any] = {"streaming": True, "max_eval_examples": 4}
    if source == "mixture":
        rows = {"chats": CHATS, "maths": prompts}
        files = {n: str(write_jsonl(tmp_path / f"{n}.jsonl", r)) for n, r in rows.items()}
        held = str(write_jsonl(tmp_path / "held.jsonl", CHATS[:2]))
        parts = {name: {"files": file, "weight": 1} for name, file in files.items()}
        keys = {"dataset": None, "mixture": parts, "validation_files": held}

    outcome = one_rank.train("--config", write_run(tmp_path, prompts, "out", **keys), code=2)

    rows_of = "the training rows of task.mixture.maths" if source == "mixture" else "training rows"
    assert f"{rows_of} are prompts without an answer" in outcome.err
    assert not outcome.loaded
