"""The decoder's benchmark: its runs are valid and alike, its numbers are right."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megakd.config.file import load_config

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import homodistil_decoder  # noqa: E402
from homodistil_summary import Found  # noqa: E402
from legs import write_leg_configs  # noqa: E402


def test_the_variants_are_valid_and_differ_in_the_method_alone(tmp_path):
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "7"]
    given = homodistil_decoder.parse(words)
    write_leg_configs(given.out, homodistil_decoder.trees(given))

    legs = homodistil_decoder.legs(given)
    configs = [
        load_config(leg.config, [*leg.overrides, f"output_dir={leg.output}"]) for leg in legs
    ]

    assert {config.seed for config in configs} == {7}
    assert len({(config.train, config.task.dataset) for config in configs}) == 1
    assert [config.method.schedule for config in configs].count("one_shot") == 2
    without_teacher = [leg.name for leg, c in zip(legs, configs, strict=True) if c.objective]
    assert without_teacher == ["one_shot_alone-7"]
    assert [c.method.score for c in configs].count("sensitivity") == 4
    ends = {leg.name: c.method.pruning_end for leg, c in zip(legs, configs, strict=True)}
    assert {name: end for name, end in ends.items() if end} == {"early-7": 120}


def report(loss: float, divergences: list[float | None], **baselines: float) -> dict:
    return {
        "student": {"metrics": {"loss": loss}},
        "pruning": [{"teacher_kl": value} for value in divergences],
        "baselines": {name: {"loss": value} for name, value in baselines.items()},
    }


def test_the_table_has_losses_and_the_largest_rise_of_the_divergence(capsys):
    names = [f"{name}-{seed}" for name in homodistil_decoder.RUNS for seed in (1, 2)]
    reports = {name: report(2.5, [0.0, 4.0, 1.0]) for name in names}
    for seed in (1, 2):
        # A run without soft targets measures no divergence.
        reports[f"one_shot_alone-{seed}"] = report(2.6, [None, None])
        reports[f"homodistil-{seed}"] = report(
            1.0 + seed, [0.0, 0.3, 0.1, 0.2], random=3.0, alone=3.5
        )

    found = homodistil_decoder.rows(Found(reports, (1, 2), ()))
    homodistil_decoder.show(found, "the command")

    assert found["homodistil"] == [(2.0, pytest.approx(0.3)), (3.0, pytest.approx(0.3))]
    assert found["alone"] == [(3.5, None)] * 2
    assert found["one_shot_alone"] == [(2.6, None)] * 2
    said = capsys.readouterr().out
    assert "2.500 ±0.707  0.300 ±0.000" in said
    assert "jump of homodistil over one_shot 0.075, 0.075" in said


def timed(seconds: float, **baselines: float) -> dict:
    """Return a report whose student and baselines took these seconds."""
    times = {"pruning-1": seconds / 2, "student": seconds / 2, **baselines}
    return {"stages": [{"name": name, "seconds": value} for name, value in times.items()]}


@pytest.fixture
def measured() -> Found:
    """Reports of two seeds, in which three variants are faster than the method."""
    reports = {}
    for seed, machine in ((1, 1.0), (2, 3.0)):
        reports |= {f"{name}-{seed}": timed(95 * machine) for name in homodistil_decoder.RUNS}
        reports |= {
            f"homodistil-{seed}": timed(100 * machine, random=60 * machine, alone=40 * machine),
            f"one_shot-{seed}": timed(80 * machine),
            f"one_shot_alone-{seed}": timed(50 * machine),
        }
    return Found(reports, (1, 2), ())


def test_a_faster_variant_takes_more_steps_until_it_costs_as_much_as_the_method(measured):
    steps = homodistil_decoder.steps_at_cost(measured, 1000)

    assert steps == {"one_shot": 1250, "one_shot_alone": 2000, "alone": 2500}


def test_runs_at_equal_cost_differ_from_the_others_in_their_steps_alone(measured, tmp_path):
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "1,2"]
    given = homodistil_decoder.parse(words)
    write_leg_configs(given.out, homodistil_decoder.trees(given))

    def configs(legs):
        return {
            leg.name: load_config(leg.config, [*leg.overrides, "output_dir=out"]) for leg in legs
        }

    short = configs(homodistil_decoder.legs(given))
    steps = homodistil_decoder.steps_at_cost(measured, given.steps)
    longer = configs(homodistil_decoder.cost_legs(given, steps))

    assert longer["one_shot-cost-2"].train.max_steps == 500
    assert longer["one_shot_alone-cost-1"].train.max_steps == 800
    for name in ("one_shot-2", "one_shot_alone-1"):
        ours = longer[name.replace("-", "-cost-")]
        assert replace(ours, train=short[name].train) == short[name]
    alone = longer["homodistil-cost-1"]
    assert (alone.baselines, alone.alone.max_steps) == (("alone",), 1000)
    assert len(longer) == 6


def test_a_run_at_equal_cost_has_the_loss_of_its_one_baseline(measured):
    longer = {"homodistil-cost-1": report(9.0, [], alone=2.5), "one_shot-cost-1": None}

    found = homodistil_decoder.at_equal_cost(measured, longer)

    assert homodistil_decoder.loss_of(found, "alone", 1) == 2.5
    assert homodistil_decoder.loss_of(found, "random", 1) is None
    assert homodistil_decoder.loss_of(found, "one_shot", 1) is None


def test_data_that_is_missing_is_named(tmp_path, capsys):
    assert homodistil_decoder.main(["--data", str(tmp_path)]) == 1
    assert "tinystories_1000.json does not exist" in capsys.readouterr().err
