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

    with pytest.raises(ValueError, match=r"after 3 steps the loss is 1\.001, and the bare loop's"):
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
