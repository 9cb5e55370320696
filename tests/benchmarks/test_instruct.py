"""The comparison on an instruct model: its rows, its runs, and the time that each side has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from lib import instruct, launching
from lib.data import llama
from lib.stories import STORIES
from megakd.config.file import load_config
from methods import instruct as benchmark
from methods.instruct_loops import share_of

SIZES = [benchmark.Size("100M", 20), benchmark.Size("80M", 15)]


@pytest.fixture
def rows(tmp_path) -> Path:
    stories = [f"There was a cat {n}. It slept." for n in range(950)]
    (tmp_path / STORIES).parent.mkdir(parents=True)
    (tmp_path / STORIES).write_text(json.dumps(stories))
    for split, path in instruct.MATHS.items():
        lines = [{"question": f"{split} {n}?", "answer": f"So\n#### {n}"} for n in range(60)]
        instruct.write_jsonl(tmp_path / path, lines)
    instruct.write_rows(tmp_path, tmp_path / "rows")
    return tmp_path / "rows"


def smollm2(folder: Path) -> Path:
    keys = {"vocab_size": 49_152, "num_key_value_heads": 3, "tie_word_embeddings": True}
    AutoConfig.for_model(**llama(30, 576, 9, 1536, **keys)).save_pretrained(folder)
    return folder


def test_held_out_conversations_are_no_training_rows_and_begin_a_story_by_its_first_sentence(rows):
    texts = {path.stem: {*path.read_text().splitlines()} for path in rows.glob("*.jsonl")}
    question, answer = instruct.rows_of(rows / "stories.jsonl")[0]["messages"]

    for name in ("validation", "maths", "stories"):
        assert texts[name]
        assert not texts[name] & texts["train"]
    first = answer["content"].split(" It slept")[0]
    assert question["content"] == f"Write a short story that begins with: {first}"


def test_a_model_does_not_diverge_from_itself_and_its_loss_is_that_of_transformers():
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    ).eval()
    # Two rows in one batch: the shorter one is padded, and the tokens of questions do not count.
    rows = [instruct.Conversation(torch.randint(32, (n,)), n // 3) for n in (12, 7)]

    losses = instruct.losses_of(model, model, rows, pad=0)

    assert losses["KL"] == pytest.approx(0, abs=1e-6)
    expected = 0.0
    for row in rows:
        labels = torch.where(torch.arange(len(row.tokens)) < row.asked, -100, row.tokens)
        loss = model(row.tokens[None], labels=labels[None]).loss.detach()
        expected += float(loss) * (len(row.tokens) - row.asked)
    counts = (12 - 4) + (7 - 2)
    assert losses["loss"] == pytest.approx(expected / counts, rel=1e-5)


def test_the_rate_follows_the_clock():
    now = iter((0.0, 0.015, 0.03, 0.515, 1.0, 2.0))
    share = share_of(lambda: next(now))
    expected = (0.0, 0.5, 0.998, 0.48, 0.0, 0.0)
    assert [share(step) for step in range(6)] == pytest.approx(expected, abs=0.01)


def test_the_time_of_the_importance_is_spent_on_more_steps(monkeypatch, tmp_path):
    """A step takes 0.25 s; the evaluations of the repair, another 10 s, are not repeated."""
    seconds = {"sorted-teacher": 6, "layers": 4, "student": 20}
    stages = [{"name": name, "seconds": one, "steps": 40} for name, one in seconds.items()]
    monkeypatch.setattr(benchmark, "shrink_leg", lambda *_: SimpleNamespace(output=tmp_path))
    monkeypatch.setattr(benchmark, "report_of", lambda *_, **__: {"stages": stages})
    times = {10: 107.5, 20: 110.0, 40: 115.0}
    logged = [{"step": n, "time": t, "train/loss": 1.0} for n, t in times.items()]
    others = [{"step": 0, "time": 105.0}, {"step": 40, "time": 120.0}]
    records = [{"stage": "student", **one} for one in (*others, *logged)]
    instruct.write_jsonl(tmp_path / "metrics.jsonl", records)

    assert benchmark.steps_for(None, SIZES[1], 1) == 40 + 10 / 0.25


def test_the_runs_are_valid_and_a_size_becomes_its_nearest_number_of_layers(rows, tmp_path):
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--runs", "shrink"]
    given = benchmark.parse([*words, "--sizes", "100M,80M"])
    given.teacher = smollm2(tmp_path / "teacher")
    given.sizes, given.rate = [*benchmark.sizes_of(given)], benchmark.best_rate(given)
    launching.write_leg_configs(given.out, benchmark.configs(given))

    config = load_config(given.out / "configs/shrink.yaml", ())

    assert config.train.learning_rate == 3e-4
    assert given.sizes == SIZES
    assert config.method.parameters == 100_000_000
    single = load_config(given.out / "configs/single.yaml", ["student.model=x"])
    assert single.method.name == "single"


def test_of_several_rates_the_one_with_the_least_divergence_on_validation_rows_is_taken(
    monkeypatch, tmp_path
):
    words = ["--data", str(tmp_path), "--out", str(tmp_path), "--rates", "1e-4,3e-4,6e-4"]
    given = benchmark.parse(words)
    given.teacher = smollm2(tmp_path / "teacher")
    given.sizes = SIZES
    divergences = {"rate-0.0001": 1.0, "rate-0.0003": 0.8, "rate-0.0006": 0.9}
    kept, tried = [], []
    monkeypatch.setattr(benchmark, "write_cut", lambda _, layers, folder: kept.append(layers))
    monkeypatch.setattr(benchmark, "run_loop", lambda *_, rate, **__: tried.append(rate))

    def score(_, name, folder, names):
        return {f"KL, {rows}": divergences[name] for rows in names}

    monkeypatch.setattr(benchmark, "score", score)
    assert benchmark.best_rate(given) == 3e-4
    assert tried == [1e-4, 3e-4, 6e-4]
    assert [(len(layers), layers[0], layers[-1]) for layers in kept] == [(20, 1, 30)]
