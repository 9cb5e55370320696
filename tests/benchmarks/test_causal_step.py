"""A causal LM step against a bare loop: both compute one thing, and every divergence has a line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megakd.config.file import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import causal_step  # noqa: E402
import causal_step_bare  # noqa: E402
import causal_step_chat  # noqa: E402
import causal_step_trl  # noqa: E402
from causal_step import Result, Seconds  # noqa: E402
from causal_step_case import FULL, QUICK, TERMS, write_case  # noqa: E402

PAIRS = (Seconds(3.0, 4.0), Seconds(1.0, 2.0))


@pytest.fixture
def logits():
    drawn = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 7, generator=drawn, dtype=torch.float64) for _ in range(2))


def test_forward_kl_is_the_sum_over_positions_of_the_teachers_divergence_from_the_student(logits):
    student, teacher = (F.softmax(each, dim=-1) for each in logits)

    found = causal_step_bare.forward_kl(*logits)

    assert torch.allclose(found, (teacher * (teacher / student).log()).sum())


@pytest.mark.parametrize("mixture", causal_step_bare.MIXTURES)
def test_both_mixtures_give_the_jensen_shannon_divergence(logits, mixture):
    q, p = (F.softmax(each, dim=-1) for each in logits)
    m = (p + q) / 2

    found = causal_step_bare.loss_of("jsd", mixture)(*logits)

    assert torch.allclose(found, ((p * (p / m).log()) + (q * (q / m).log())).sum() / 2)


def test_the_bare_loop_learns_and_leaves_the_teacher_alone():
    models, ids = causal_step_bare.random_models(QUICK), causal_step_bare.random_ids(QUICK, 1)
    before = causal_step_bare.plain_copy(models.teacher).state_dict()
    bare = causal_step_bare.Bare(models, ids * 5, causal_step_bare.forward_kl)
    first = bare.loss(0)

    for index in range(5):
        bare.step(index)

    assert bare.loss(0) < first
    after = models.teacher.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("divergence", TERMS)
def test_the_run_has_one_soft_target_and_no_sharding(tmp_path, divergence):
    write_case(tmp_path, QUICK, divergence)

    config = load_config(tmp_path / "run.yaml")

    assert [term.loss for term in config.objective] == [TERMS[divergence]["loss"]]
    assert (config.student.deepspeed, config.teacher.deepspeed) == ("zero0", "teacher_zero0")


class Constant:
    """A side with one loss."""

    def __init__(self, loss: float) -> None:
        self._loss = loss

    def loss(self, index: int) -> float:
        return self._loss + 0 * index


def test_sides_that_compute_different_things_are_refused():
    causal_step.check_agree(Constant(1.00005), Constant(1.0), 0)

    with pytest.raises(ValueError, match=r"after 3 steps the loss is 1\.001, and the other side's"):
        causal_step.check_agree(Constant(1.001), Constant(1.0), 3)


@pytest.mark.parametrize(
    ("side", "sizes", "end"),
    [
        ("megakd", FULL, "; targets 0.85 and 0.5: missed\n"),
        ("megakd", QUICK, "0.500 to 0.750\n"),
        ("GKDTrainer", FULL, "0.500 to 0.750\n"),
    ],
)
def test_only_megakd_at_full_size_is_held_against_the_targets(capsys, side, sizes, end):
    given = argparse.Namespace(sizes=sizes, command="command")

    causal_step.show(side, "jsd", Result(PAIRS, 6_000_000, 10_000_000), given)

    shown = capsys.readouterr().out
    assert f"jsd, {side}: CPU time 0.625 (2000 against 3000 ms)" in shown
    assert "extra memory 0.60 (6 against 10 MB)" in shown
    assert shown.endswith(end)


@pytest.mark.parametrize("counted", causal_step_chat.COUNTED)
def test_a_conversation_has_the_words_of_the_text_in_order(counted):
    text = " ".join(f"w{number}" for number in range(QUICK.length - 1))
    words = causal_step_chat.question_words(QUICK, counted)

    messages = causal_step_chat.messages_of(text, words)

    assert " ".join(message["content"] for message in messages) == text
    asked = sum(len(m["content"].split()) for m in messages if m["role"] == "user")
    assert asked == {"all": 0, "answers": QUICK.length // 2}[counted]


class Tokens:
    """A side with one batch of tokens."""

    def __init__(self, *ids: int) -> None:
        self.ids = [torch.tensor([ids])]


def test_chat_rows_with_other_tokens_than_the_text_rows_are_refused():
    causal_step_chat.check_same_tokens(Tokens(1, 2), Tokens(1, 2))

    with pytest.raises(ValueError, match="do not have the tokens of the text rows"):
        causal_step_chat.check_same_tokens(Tokens(1, 2), Tokens(1, 3))


@pytest.mark.parametrize(("seconds", "met"), [(1.0, "met"), (1.02, "missed")])
def test_chat_rows_are_held_against_one_per_cent(capsys, seconds, met):
    given = argparse.Namespace(sizes=FULL, command="command")

    causal_step.show_chat("all", "jsd", [Seconds(seconds, 1.0)] * 3, given)

    shown = capsys.readouterr().out
    assert f"CPU time {seconds:.4f} ({1000 * seconds:.1f} against 1000.0 ms)" in shown
    assert shown.endswith(f"; target 1.01: {met}\n")


def test_a_missing_trl_is_said(capsys, monkeypatch):
    monkeypatch.setattr(causal_step_trl.importlib.util, "find_spec", lambda name: None)

    assert causal_step_trl.available() == []

    assert capsys.readouterr().out == "trl is not installed: skipped\n"


@pytest.mark.slow
def test_both_divergences_are_measured_and_printed():
    program = [sys.executable, "benchmarks/causal_step.py", "--quick", "--pairs", "2"]

    said = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)

    assert said.returncode == 0, said.stderr
    assert said.stdout.count("after 0 steps the losses agree") == 2
    assert said.stdout.count("after 4 steps the losses agree") == 2
    for divergence in TERMS:
        assert f"\n{divergence}, megakd: CPU time " in said.stdout
        assert f"| {divergence}, a step of megakd against a bare loop, 2 pairs |" in said.stdout


@pytest.mark.slow
def test_chat_rows_are_measured_against_text_rows_with_the_same_tokens():
    program = [sys.executable, "benchmarks/causal_step.py", "--chat", "--quick", "--pairs", "2"]
    program += ["--divergences", "jsd"]

    said = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)

    assert said.returncode == 0, said.stderr
    assert said.stdout.count("steps the losses agree") == 2
    assert "targets of a step: 30 in chat, 30 in text" in said.stdout
    assert "targets of a step: 16 in chat, 30 in text" in said.stdout
    for counted in causal_step_chat.COUNTED.values():
        what = f"jsd, a step on chat rows ({counted}) against text rows"
        assert f"\n{what}: CPU time " in said.stdout
        assert f"| {what}, 2 pairs |" in said.stdout
