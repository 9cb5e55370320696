"""The cost of a sandwich step: what is measured, and how it is counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megakd.config.file import load_config
from megakd.contract.views import View

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sandwich  # noqa: E402
from sandwich import Pair  # noqa: E402

SMALL = ("--teacher", "2x32", "--vocabulary", "300", "--length", "8")


@pytest.fixture
def config(tmp_path):
    sandwich.write_run(tmp_path, sandwich.parse(SMALL), 3)
    return load_config(tmp_path / "run.yaml")


def test_both_models_have_one_shape_no_dropout_and_different_weights(config):
    teacher, student = (dict(role.model.config) for role in (config.teacher, config.student))

    assert teacher.pop("initializer_range") == 0.03
    assert teacher == student
    assert (student["hidden_dropout_prob"], student["attention_probs_dropout_prob"]) == (0, 0)
    assert config.student.deepspeed == "zero3"
    assert config.teacher.deepspeed == "teacher_zero0"


def test_the_losses_are_minidiscs_own(config):
    hidden, soft = config.objective

    # Of two layers, the seven depths are these three.
    assert (hidden.loss, hidden.weight, hidden.layer_mapping) == (
        *("hidden_mse", 0.5, ("0:0", "1:1", "2:2")),
    )
    assert (soft.loss, soft.weight) == ("soft_target_kl", 0.5)


def test_the_models_are_those_that_the_target_is_about(tmp_path):
    sandwich.write_run(tmp_path, sandwich.parse(("--length", "8", "--vocabulary", "300")), 0)

    config = load_config(tmp_path / "run.yaml")
    sizes = config.student.model.config
    assert config.objective[0].layer_mapping == tuple(f"{i}:{i}" for i in range(7))
    assert (sizes["num_attention_heads"], sizes["intermediate_size"]) == (12, 1536)


def test_one_stage_plans_all_candidates_and_the_other_one_pass_at_full_width(config):
    views = {"0.5": View((1, 1), (64, 64)), "0.9": View((1, 0), (8, 8))}
    given = sandwich.parse((*SMALL, "--passes-per-backward", "1"))

    several, plain = (sandwich.stage_of(config, "teacher", v, given) for v in (views, {}))

    plan = several.strategy.passes(5)
    assert [(p.teacher, p.view, p.scale) for p in plan] == [
        ("teacher", "0.5", 0.5),
        ("teacher", "0.9", 0.5),
    ]
    assert several.passes_per_backward == 1
    (one,) = plain.strategy.passes(5)
    assert (one.view, one.scale, plain.views) == (None, 1.0, {})


def test_ratios_are_of_the_mean_over_ranks_and_of_rank_0_apart(capsys):
    # Per step: rank 0 takes 3 against 2 seconds, rank 1 takes 1 against 2.
    by_rank = [[Pair(3.0, 2.0)] * 3, [Pair(1.0, 2.0)] * 3]

    sandwich.show(by_rank, sandwich.parse(()), 2)

    shown = capsys.readouterr().out
    assert "ZeRO 2, mean of ranks: 1.000 (95 %: 1.000 to 1.000)" in shown
    assert "ZeRO 2, rank 0: 1.500" in shown
    assert "a step of rank 0: 3000 against 2000 ms" in shown
    assert "target 1.75: met" in shown
    assert "| sandwich of 7 against a plain step, ZeRO 2, 2 rank(s), 6x384, 16 x 64 tokens |" in (
        shown
    )


def test_another_size_is_not_held_against_the_target(capsys):
    sandwich.show([[Pair(9.0, 1.0)] * 2], sandwich.parse(("--rows", "2")), 0)

    assert "target" not in capsys.readouterr().out


def test_the_fastest_steps_of_each_rank_need_not_be_one_pair():
    by_rank = [[Pair(4.0, 3.0), Pair(5.0, 2.0)], [Pair(2.0, 1.0), Pair(9.0, 9.0)]]

    assert sandwich.least_ratio(by_rank) == pytest.approx((4 + 2) / (2 + 1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_cost_is_measured_and_printed(stage):
    sizes = ("--rows", "2", "--pairs", "2", "--warm-up", "1", "--grid", "0.5,0.7")
    program = [sys.executable, "benchmarks/sandwich.py", "--stages", str(stage)]

    shown = subprocess.run(
        [*program, *SMALL, *sizes], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert shown.returncode == 0, shown.stderr
    assert f"| sandwich of 2 against a plain step, ZeRO {stage}, 2 rank(s), 2x32" in shown.stdout
