"""The benchmark of shrink: its runs are valid and alike, its numbers are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megakd.config.file import load_config
from megakd.methods.shrink import hops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import shrink  # noqa: E402
from launching import write_config  # noqa: E402


def test_the_variants_are_valid_and_take_equal_steps(tmp_path):
    given = shrink.parse(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    write_config(given.out / "run.yaml", shrink.config(given))

    configs = {
        leg.name: load_config(leg.config, [*leg.overrides, f"output_dir={leg.output}"])
        for leg in (shrink.leg(given, name, 7) for name in given.runs)
    }

    assert {config.seed for config in configs.values()} == {7}
    assert len({(config.train, config.task.dataset) for config in configs.values()}) == 1
    methods = [config.method for config in configs.values()]
    assert {m.repair_steps + m.on_policy_steps for m in methods} == {400}
    assert {m.trial_steps for m in methods} == {60}
    alone = sorted(round(m.candidates[0] * 5) for m in methods if len(m.candidates) == 1)
    assert alone == sorted(shrink.DEPTHS)
    assert configs["on_policy-7"].rollout is not None


def scores(shrunk: float, alone: dict[int, float], **changes: float) -> shrink.Scores:
    return shrink.Scores(
        **{
            "teacher": 1.5,
            "shrink": shrunk,
            "random": 3.0,
            "cut": 7.0,
            "trial": 3.5,
            "chosen": 3,
            "alone": alone,
            "on_policy": None,
            "trial_seconds": 10.0,
            "alone_seconds": 80.0,
            **changes,
        }
    )


def test_the_table_compares_the_choice_with_the_best_of_all(capsys):
    found = [scores(2.0, {3: 1.9, 2: 2.1}), scores(2.2, {3: 2.3, 2: 2.1}), scores(2.1, {})]

    shrink.show(found, "the command")

    assert [one.is_best for one in found] == [True, False, None]
    assert [one.tried for one in found] == [1.9, 2.1, None]
    said = capsys.readouterr().out
    assert "tried  2.0000 ±0.1414" in said
    assert "the best candidate alone in 1 of 2 seeds" in said
    assert "on_policy" not in said


def test_the_loss_of_the_cut_is_that_before_the_first_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"stage": "other", "eval/layers-3/loss": 1.0},
        {"stage": "trial-1", "eval/layers-2/loss": 2.0, "eval/layers-3/loss": 5.0},
        {"stage": "trial-1", "eval/layers-2/loss": 2.0, "eval/layers-3/loss": 4.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert shrink.cut_loss(path, 3) == 5.0


def test_missing_data_is_named(tmp_path, capsys):
    assert shrink.main(["--data", str(tmp_path)]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_time_of_a_run_is_that_of_its_trainings():
    stages = [{"name": name, "seconds": 2.5} for name in ("layers", "trial-1", "student")]

    assert shrink.seconds_of({"stages": stages}) == pytest.approx(5.0)


def test_one_hop_and_two_hops_take_equal_steps(tmp_path):
    given = shrink.parse(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--hops"])
    write_config(given.out / "run.yaml", shrink.config(given))

    one, two = (
        load_config(leg.config, [*leg.overrides, f"output_dir={leg.output}"]).method
        for leg in (shrink.leg(given, name, 7) for name in given.runs)
    )

    assert (one.assistant, two.assistant) == ("never", "auto_2.5")
    assert len(hops(two, 260_032)) == 2
    assert one.trial_steps + one.repair_steps == 2 * (two.trial_steps + two.repair_steps)
    assert one.target_sparsity == two.target_sparsity
