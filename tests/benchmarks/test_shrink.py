"""The benchmark of shrink: its runs are valid and alike, its numbers are right."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.config.file import load_config
from megakd.methods.shrink import hops

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import books_case  # noqa: E402
import shrink  # noqa: E402
import shrink_summary  # noqa: E402
from launching import write_config  # noqa: E402
from shrink_cases import CASES  # noqa: E402


@pytest.mark.parametrize("case", CASES)
def test_the_variants_are_valid_and_take_equal_steps(tmp_path, case):
    folders = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    given = shrink.parse([*folders, "--case", case])
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
    together = configs["shrink-7"].method.candidates
    alone = [m.candidates[0] for m in methods if len(m.candidates) == 1]
    assert alone == list(together)
    assert [round(share * CASES[case].layers) for share in alone] == list(CASES[case].depths)
    assert configs["on_policy-7"].rollout is not None


def scores(shrunk: float, alone: dict[int, float], **changes: float) -> shrink_summary.Scores:
    return shrink_summary.Scores(
        **{
            "teacher": 1.5,
            "shrink": shrunk,
            "random": 3.0,
            "cut": 7.0,
            "trial": 3.5,
            "chosen": 3,
            "divergences": {3: 0.5, 2: 0.75},
            "alone": alone,
            "on_policy": None,
            "trial_seconds": 10.0,
            "alone_seconds": 80.0,
            **changes,
        }
    )


def test_the_table_compares_the_choice_with_the_best_of_all(capsys):
    found = [scores(2.0, {3: 1.9, 2: 2.1}), scores(2.2, {3: 2.3, 2: 2.1}), scores(2.1, {})]

    shrink_summary.show(found, "a case", "the command", ["final/ opens"])

    assert [one.best_alone for one in found] == [3, 2, None]
    assert [one.tried for one in found] == [1.9, 2.1, None]
    said = capsys.readouterr().out
    assert "tried  2.0000 ±0.1414" in said
    assert "layers-2 alone  2.1000" in said
    assert "the best alone have 3, 2; the best candidate alone in 1 of 2 seeds" in said
    assert "| a case | `the command` |" in said
    assert "; final/ opens |" in said
    assert "on_policy" not in said


def test_a_difference_is_that_of_pairs_and_negative_if_shrink_is_better():
    found = [scores(2.0, {3: 1.9}), scores(2.2, {3: 2.3}), scores(9.0, {})]

    assert shrink_summary.difference(found, "tried") == (
        "shrink - tried +0.0000 (sd 0.1414; +0.1000, -0.1000)"
    )
    assert shrink_summary.difference(found[:1], "random") == (
        "shrink - random -1.0000 (sd 0.0000; -1.0000)"
    )
    assert shrink_summary.difference(found, "on_policy") is None


def report_of(loss: float, chosen: int | None, **baselines: float) -> dict:
    rows = {3: 0.7, 2: 0.6}
    return {
        "teacher": {"metrics": {"loss": 1.0}},
        "student": {"metrics": {"loss": loss}},
        "baselines": {name: {"loss": value} for name, value in baselines.items()},
        "candidates": [
            {"shape": f"{layers} layers, 1 neurons", "metric": kl, "chosen": layers == chosen}
            for layers, kl in rows.items()
        ],
        "stages": [
            {"name": "trial-1", "seconds": 2.0, "metrics": {"loss": 4.0}},
            {"name": "student", "seconds": 3.0, "metrics": {"loss": loss}},
        ],
    }


def test_the_candidates_alone_count_only_if_all_have_finished(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"stage": "trial-1", "eval/layers-2/loss": 5.0}) + "\n")
    reports = {
        "shrink": report_of(2.0, 2, random=3.0),
        "layers-3": report_of(1.5, 3),
        "layers-2": None,
        "on_policy": None,
    }

    some = shrink_summary.scores_of(reports, (3, 2), log)
    every = shrink_summary.scores_of(reports | {"layers-2": report_of(1.7, 2)}, (3, 2), log)

    assert some.alone == {}
    assert every.alone == {3: 1.5, 2: 1.7}
    assert (every.chosen, every.best_alone, every.cut, every.random) == (2, 3, 5.0, 3.0)
    assert every.divergences == {3: 0.7, 2: 0.6}
    assert every.alone_seconds == 10.0
    assert shrink_summary.scores_of(reports | {"shrink": None}, (3, 2), log) is None


def test_the_teacher_of_the_books_holds_out_what_shrink_holds_out(tmp_path):
    given = shrink.parse(["--data", str(tmp_path), "--case", "books"])
    path = write_config(tmp_path / "run.yaml", shrink.config(given))
    teacher = books_case.teacher_config(given.data, given.teacher)
    trained = load_config(write_config(tmp_path / "teacher.yaml", teacher)).task
    shrunk = load_config(path).task

    assert (shrunk.dataset, shrunk.max_length) == (trained.dataset, trained.max_length)
    # The held-out pieces of a smaller number are some of those of a larger number.
    assert shrunk.max_eval_examples < trained.max_eval_examples


def test_a_student_is_opened_by_transformers_alone(tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)

    assert shrink_summary.stock_class(tmp_path) == "LlamaForCausalLM"


def test_trials_of_several_lengths_differ_in_their_length_alone(tmp_path):
    folders = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    given = shrink.parse([*folders, "--trials", "40,120"])
    write_config(given.out / "run.yaml", shrink.config(given))

    short, long = (
        load_config(leg.config, [*leg.overrides, "output_dir=run"])
        for leg in (shrink.leg(given, name, 7) for name in given.runs)
    )

    assert (short.method.trial_steps, long.method.trial_steps) == (40, 120)
    assert replace(short, method=replace(short.method, trial_steps=120)) == long


def test_the_choices_of_trials_are_printed_by_length(tmp_path, monkeypatch, capsys):
    given = shrink.parse(["--data", str(tmp_path), "--trials", "40,120", "--seeds", "1,2"])
    best = {"trial-40-1": 3, "trial-40-2": 3, "trial-120-1": 2, "trial-120-2": None}

    def finished(leg):
        chosen = best[leg.name]
        report = report_of(1.0, chosen)
        for row in report["candidates"]:
            row["metric"] = 0.5 if row["chosen"] else 0.75
        return None if chosen is None else report

    monkeypatch.setattr(shrink, "finished", finished)

    shrink.show_trials(given, "the command")

    said = capsys.readouterr().out
    first = "KL 3 layers 0.500, 2 layers 0.750"
    assert f"trial-40: 3, 3 layers ({first}; {first})" in said
    assert "trial-120: 2 layers (KL 3 layers 0.750, 2 layers 0.500)" in said


def test_hops_are_those_of_the_stories(tmp_path, capsys):
    with pytest.raises(SystemExit):
        shrink.parse(["--data", str(tmp_path), "--case", "books", "--hops"])

    assert "embeddings" in capsys.readouterr().err


def test_the_loss_of_the_cut_is_that_before_the_first_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"stage": "other", "eval/layers-3/loss": 1.0},
        {"stage": "trial-1", "eval/layers-2/loss": 2.0, "eval/layers-3/loss": 5.0},
        {"stage": "trial-1", "eval/layers-2/loss": 2.0, "eval/layers-3/loss": 4.0},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert shrink_summary.cut_loss(path, 3) == 5.0


@pytest.mark.parametrize("case", CASES)
def test_missing_data_is_named(tmp_path, capsys, case):
    assert shrink.main(["--data", str(tmp_path), "--case", case]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_time_of_a_run_is_that_of_its_trainings():
    stages = [{"name": name, "seconds": 2.5} for name in ("layers", "trial-1", "student")]

    assert shrink_summary.seconds_of({"stages": stages}) == pytest.approx(5.0)


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
