"""`megakd doctor`: what is fine, doubtful or wrong with a run, before it is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import bert, run_in, write_jsonl, write_reviews, write_text

from megakd.run.holder import written_once

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    return write_reviews(tmp_path_factory.mktemp("doctor") / "reviews")


@pytest.fixture
def config(reviews, tmp_path):
    def write(task=None, *, teacher=None, train=None, **sections: Any) -> Path:
        return run_in(
            tmp_path,
            task or {"type": "classification", "dataset": str(reviews)},
            teacher=teacher or {"model": bert(2), "finetune": {}},
            method={"name": "single"},
            train={"max_steps": 200, **(train or {})},
            **sections,
        )

    return write


@pytest.fixture
def examined(one_rank):
    def examine(config: Path, *words: object, code: int = 0) -> list[tuple[str, str, str]]:
        outcome = one_rank.megakd("doctor", config, "--json", *words)
        assert outcome.code == code, outcome.err
        return [(one["part"], one["level"], one["text"]) for one in json.loads(outcome.out)]

    return examine


def texts(findings: list[tuple[str, str, str]], part: str, level: str = "ok") -> str:
    return "\n".join(text for *where, text in findings if where == [part, level])


def test_a_run_that_is_fine_has_a_line_for_each_part_and_leaves_nothing(
    examined, one_rank, config, tmp_path
):
    path = config()
    before = sorted(tmp_path.rglob("*"))

    result = examined(path, "--steps", 25)

    assert {level for _, level, _ in result} == {"ok"}
    assert {part for part, _, _ in result} == {"config", "ranks", "machine", "data", "steps"}
    assert "torch 2." in texts(result, "machine")
    assert "64 rows of train" in texts(result, "data")
    steps = texts(result, "steps")
    assert "25 steps of student" in steps
    assert "100 of 100 rows carry a loss on labels" in steps
    assert "GB per rank, and the plan says" in steps
    assert "memory is the same after 20 and 25 steps" in steps
    assert sorted(tmp_path.rglob("*")) == before
    lines = one_rank.megakd("doctor", path, "--steps", 0).out.splitlines()
    assert all(line.startswith("ok       ") for line in lines)
    assert not any("steps: " in line for line in lines)


@pytest.mark.parametrize("name", ["out.doctor", "out/.doctor"], ids=["new", "there"])
def test_a_second_examination_leaves_the_folder_to_the_first(one_rank, config, tmp_path, name):
    """An output folder that is there is examined on its own disk."""
    path, folder = config(), tmp_path / name
    folder.parent.mkdir(exist_ok=True)
    with written_once(folder):
        refused = one_rank.megakd("doctor", path, "--steps", 0, code=2)
        assert folder.is_dir()

    assert f"{folder} is in use by another run" in refused.out + refused.err
    one_rank.megakd("doctor", path, "--steps", 0, code=0)
    assert not folder.exists()
    assert name == "out.doctor" or not [*folder.parent.iterdir()]


def test_a_run_that_would_fail_has_the_error_of_the_run_as_its_last_line(
    examined, one_rank, config, reviews
):
    result = examined(config(train={"kernels": "triton"}), code=1)

    refused = one_rank.train(config(train={"kernels": "triton"}))
    part, level, text = result[-1]
    assert (part, level) == ("machine", "failure")
    assert f"megakd: error: {text}\n" == refused.err[-len(text) - 16 :]

    rows = [json.loads(line) for line in (reviews / "train.jsonl").read_text().splitlines()]
    broken = reviews.with_name("broken")
    write_jsonl(broken / "train.jsonl", [*rows, {"text": 3, "label": "positive"}])
    write_jsonl(broken / "validation.jsonl", rows)
    result = examined(config(task={"type": "classification", "dataset": str(broken)}), code=1)
    assert result[-1][:2] == ("data", "failure")
    assert f"line {len(rows) + 1}" in result[-1][2]


def test_tokens_without_a_loss_and_rows_that_never_count_are_counted(examined, config, tmp_path):
    text = write_text(tmp_path / "text.txt")
    path = config(task={"type": "mlm", "dataset": str(text)}, teacher={"model": bert(2)})

    result = examined(path, "--steps", 5)

    assert "tokens carry a loss on labels" in texts(result, "steps")
    assert "teacher.model has random weights" in texts(result, "data", "warning")


def test_a_teacher_answers_a_few_steps_and_fills_no_cache(one_rank, config):
    path = config(teacher={"model": bert(2), "cache": "auto"})

    outcome = one_rank.megakd("doctor", path, "--steps", 2, code=0)

    assert "2 steps of student" in outcome.out
    assert "answers" not in outcome.err


LEAK = """
from pydantic.dataclasses import dataclass
from megakd.contract.terms import STRICT, PluginTerm

KEPT = []

@dataclass(config=STRICT, frozen=True, kw_only=True)
class Leak(PluginTerm):
    unit = "examples"

    def total(self, student, teacher, batch):
        from megakd.losses.plugin_losses import logits_of

        KEPT.append(bytearray(b"1" * 8_000_000))
        return logits_of(student).sum() * 0.0
"""


@pytest.mark.slow
def test_memory_that_grows_with_every_step_is_told(config, tmp_path, monkeypatch):
    (tmp_path / "leaking_loss.py").write_text(LEAK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = config(objective=[{"loss": "soft_target_kl"}, {"loss": "leaking_loss:Leak"}])

    words = [sys.executable, "-m", "megakd", "doctor", str(path), "--steps", "50"]
    output = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "warning  steps: memory has grown by 0." in output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a slots=2", "a slots=2"], "multiple entries for a"),
        (["a"], "bad entry: a"),
        ([], "is empty"),
    ],
)
def test_a_hostfile_with_a_node_twice_or_without_slots_is_named(
    examined, config, tmp_path, lines, message
):
    hosts = tmp_path / "hosts"
    hosts.write_text("\n".join(lines) + "\n")

    ((part, level, text),) = examined(config(), "--hostfile", hosts, code=1)

    assert (part, level) == ("hostfile", "failure")
    assert message in text
    assert "write each node once, as: node-1 slots=8" in text
    hosts.write_text("a slots=2\nb slots=4\n")
    result = examined(config(), "--hostfile", hosts, "--steps", 0)
    assert texts(result, "hostfile") == "a with 2 ranks, b with 4 ranks"
