"""MiniDisc's benchmark: what its legs are, and what it makes of their reports."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from megakd.config.file import load_config
from megakd.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import launching  # noqa: E402
import legs  # noqa: E402
import machine  # noqa: E402
import minidisc  # noqa: E402
import minidisc_cases  # noqa: E402
import minidisc_summary  # noqa: E402


def candidate(sparsity: float, metric: float, *, chosen: bool = False, **more: float) -> dict:
    found = {"iteration": 1, "sparsity": sparsity, "metric": metric, "chosen": chosen}
    return {**found, "tradeoff": metric + 0.2 * sparsity, **more}


def report(student: float, candidates: list[dict], *seconds: float) -> dict:
    return {
        "metric_name": "accuracy",
        "teacher": {"metrics": {"accuracy": 0.9}},
        "student": {"metrics": {"accuracy": student}},
        "candidates": candidates,
        "stages": [{"name": f"stage {n}", "seconds": s} for n, s in enumerate(seconds)],
    }


@pytest.fixture
def reports() -> dict[str, dict]:
    """The assistant of 0.8 has the best student; MiniDisc takes the one of 0.7."""
    tried = [
        candidate(0.5, 0.86, student_metric=0.60),
        candidate(0.7, 0.85, student_metric=0.62),
        candidate(0.8, 0.85, student_metric=0.63, chosen=True),
        candidate(0.9, 0.50, student_metric=0.50),
    ]
    trial = [
        candidate(0.5, 0.86),
        candidate(0.7, 0.85, chosen=True),
        candidate(0.8, 0.81),
        candidate(0.9, 0.50),
        candidate(0.95, 0.10),
    ]
    second = candidate(0.9, 0.61, chosen=True) | {"iteration": 2}
    return {
        "minidisc": report(0.61, [*trial, second], 10.0, 20.0),
        "maxidisc": report(0.625, tried, 40.0, 35.0),
        "direct": report(0.55, [], 9.0),
    }


def outcomes_of(*differences: float) -> list[minidisc_summary.Outcome]:
    return [
        minidisc_summary.Outcome(
            *("pydocs", seed, 90.0, 60.0 + difference, 60.0, 55.0),
            *(0.9, 0.8, 0.5, 0.7, 0.8, 0.5, 30.0),
        )
        for seed, difference in enumerate(differences)
    ]


def test_an_outcome_is_in_points_of_the_reports_split(reports):
    found = minidisc_summary.outcome("pydocs", 1, reports)

    assert found.teacher == pytest.approx(90.0)
    assert (found.to_best, found.to_direct) == (pytest.approx(-1.5), pytest.approx(6.0))
    assert found.ratio == pytest.approx(30 / 75)
    assert found.seconds == 30.0


def test_the_choice_is_judged_by_the_student_that_the_same_assistant_taught(reports):
    found = minidisc_summary.outcome("pydocs", 1, reports)

    assert (found.chosen, found.best) == (0.7, 0.8)
    assert found.regret == pytest.approx(1.0)


def test_correlations_are_over_the_sparsities_that_were_really_tried(reports):
    found = minidisc_summary.outcome("pydocs", 1, reports)

    # Trade-offs .96 .99 1.01 .68 and students .60 .62 .63 .50 are in one order; in the trial
    # .96 .99 .97 .68 the two in the middle change places, and 0.95 has no student.
    assert found.tried == pytest.approx(1.0)
    assert found.in_trial == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("tradeoffs", "students", "expected"),
    [
        ({0.5: 1.0, 0.7: 2.0, 0.9: 3.0}, {0.5: 9.0, 0.7: 8.0, 0.9: 7.0}, -1.0),
        ({0.5: 1.0, 0.7: 2.0}, {0.7: 1.0}, math.nan),
        ({0.5: 1.0, 0.7: 2.0}, {0.5: 3.0, 0.7: 3.0}, math.nan),
    ],
    ids=["reversed", "one in common", "all students alike"],
)
def test_a_correlation_is_spearmans_where_it_is_defined(tradeoffs, students, expected):
    found = minidisc_summary.correlation(tradeoffs, students)

    assert found == pytest.approx(expected, nan_ok=True)


def test_an_interval_is_students():
    mean, low, high = machine.mean_interval([1.0, 2.0, 3.0])

    # 4.3027 is the 97.5 % quantile of t with two degrees of freedom.
    assert mean == 2.0
    assert (high - mean, mean - low) == (pytest.approx(4.3027 / 3**0.5, abs=1e-4),) * 2


def test_a_single_value_has_no_interval():
    mean, *interval = machine.mean_interval([1.0])

    assert mean == 1.0
    assert all(map(math.isnan, interval))


@pytest.mark.parametrize(
    ("differences", "shown"),
    [
        ((-0.1, -0.2, -0.15), "the mean yes, its whole interval yes"),
        ((-2.0, 0.2, 1.0), "the mean yes, its whole interval no"),
        ((-2.0, -0.2, -1.0), "the mean no, its whole interval no"),
        ((0.0,), "the mean yes, its whole interval no"),
    ],
    ids=["certain", "too few to be certain", "missed", "one seed proves nothing"],
)
def test_the_difference_is_held_against_its_target_with_and_without_its_interval(
    differences, shown
):
    assert f"at least -0.5: {shown}" in minidisc_summary.verdict(outcomes_of(*differences))


def test_a_correlation_that_no_seed_defines_is_said_to_be_none():
    outcomes = [found._replace(tried=math.nan) for found in outcomes_of(0.0, 0.1)]

    shown = minidisc_summary.verdict(outcomes)

    assert "correlation of trade-off and student, assistants tried: not defined" in shown
    assert minidisc_summary.rows(outcomes, "python x.py", "a teacher")


def test_there_is_a_row_per_task_with_means_and_spreads(reports):
    outcomes = [
        minidisc_summary.outcome(task, seed, reports)
        for task in ("pydocs", "sst2")
        for seed in (1, 2)
    ]

    pydocs, sst2 = minidisc_summary.rows(outcomes, "python x.py", "teacher 4x192")

    assert pydocs.startswith("| pydocs, teacher 4x192 | `python x.py` |")
    assert sst2.startswith("| sst2, ")
    assert "minidisc 61.00, maxidisc 62.50, direct 55.00; correlation 1.00" in pydocs
    assert "time 0.40 of maxidisc's" in pydocs
    assert "sd over 2 seed(s): teacher 0.00" in pydocs
    assert minidisc_summary.table(outcomes).splitlines()[-1].split()[0] == "mean"


@pytest.fixture
def benchmark_root(tmp_path, monkeypatch) -> Path:
    """A repository of its own, so that configs and runs are not written into this one."""
    for module in (minidisc, minidisc_cases, legs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    splits = {"train": [["a", "greet"], ["b", "ask"]], "val": [["c", "ask"]], "test": []}
    (tmp_path / "data" / "clinc150").mkdir(parents=True)
    (tmp_path / "data" / "clinc150" / "data_full.json").write_text(json.dumps(splits))
    return tmp_path


def given(*words: str):
    return minidisc.parse([*words, "--data", "data", "--output", "out"])


def test_clinc150_becomes_three_files_without_what_is_out_of_scope(benchmark_root):
    minidisc.write_configs(Path("out/minidisc/clinc150"), "clinc150", given())

    folder = benchmark_root / "out" / "minidisc" / "clinc150" / "clinc150"
    assert (folder / "train.csv").read_text().split() == ["text,label", "a,greet", "b,ask"]
    assert sorted(p.name for p in folder.iterdir()) == ["test.csv", "train.csv", "validation.csv"]


@pytest.mark.parametrize("task", ["pydocs", "clinc150", "sst2"])
def test_every_leg_is_a_valid_config_that_differs_in_method_and_teacher_alone(benchmark_root, task):
    words = (
        "--grid",
        "0.5,0.9",
        "--steps",
        "40",
        "--teacher-steps",
        "30",
        "--set",
        "train.bf16=true",
    )
    folder = Path("out/minidisc") / task
    minidisc.write_configs(folder, task, given(*words))

    made = minidisc.legs(folder, 7, given(*words))
    configs = [
        load_config(benchmark_root / leg.config, [*leg.overrides, f"output_dir={leg.output}"])
        for leg in made
    ]

    teacher, *others = configs
    assert [leg.output.name for leg in made] == [
        *("teacher-seed-7", "minidisc-seed-7", "maxidisc-seed-7", "direct-seed-7"),
    ]
    assert teacher.method.name == "finetune"
    assert (teacher.seed, teacher.train.max_steps) == (7, 30)
    assert teacher.student.model.config["hidden_size"] == 192
    assert [config.method.name for config in others] == ["minidisc", "maxidisc", "direct"]
    for config in others:
        assert config.teacher.model == f"out/minidisc/{task}/teacher-seed-7/final"
        assert config.method.sparsities == (0.5, 0.9)
        assert (config.seed, config.train.max_steps, config.eval.eval_steps) == (7, 40, 20)
        assert config.train.bf16
    assert not teacher.train.bf16


def test_a_leg_is_started_by_the_launcher_with_its_overrides():
    leg = minidisc.legs(Path("out"), 3, given())[2]

    settings = [*leg.overrides, f"output_dir={leg.output}"]
    command = launching.launch_command("train", leg.config, 2, settings)

    assert command[1:4] == ["-m", "deepspeed.launcher.runner", "--quiet"]
    assert command[-7:] == [
        *("launch/train.py", "--config", "out/schedule.yaml", "method.name=maxidisc"),
        *("teacher.model=out/teacher-seed-3/final", "seed=3", "output_dir=out/maxidisc-seed-3"),
    ]


def test_a_given_teacher_brings_its_own_tokenizer(benchmark_root):
    options = given("--teacher", "folder")

    tree = minidisc_cases.teacher_config({"type": "classification"}, options, steps=50)

    assert tree["train"]["max_steps"] == 50
    assert tree["student"]["model"] == "folder"
    assert "tokenizer" not in tree["task"]


@pytest.fixture
def finished_leg(benchmark_root) -> legs.Leg:
    """As a run leaves it."""
    folder = Path("out/minidisc/pydocs")
    minidisc.write_configs(folder, "pydocs", given())
    leg = minidisc.legs(folder, 1, given())[0]
    output = benchmark_root / leg.output
    output.mkdir(parents=True)
    (output / "config.yaml").write_text((benchmark_root / leg.config).read_text() + "seed: 1\n")
    return leg


def test_a_leg_without_a_report_is_not_finished(finished_leg):
    assert legs.finished(finished_leg) is None


def test_a_leg_of_other_settings_in_the_same_folder_is_refused(finished_leg, benchmark_root):
    (benchmark_root / finished_leg.output / "report.json").write_text("{}")
    other = finished_leg._replace(overrides=("seed=1", "train.max_steps=77"))

    with pytest.raises(CheckpointError, match="finished run of another config"):
        legs.finished(other)


def test_legs_that_are_finished_are_not_started_again(benchmark_root, monkeypatch, capsys, reports):
    started = []

    def finished(leg):
        return {"name": "teacher"} if leg.name == "teacher" else reports.get(leg.name)

    def trained(config, output, *, ranks, overrides, jobs):
        name = output.name.partition("-seed")[0]
        started.append(name)
        return reports_of_runs[name]

    reports_of_runs = {"direct": reports.pop("direct")}
    monkeypatch.setattr(legs, "finished", finished)
    monkeypatch.setattr(legs, "trained", trained)

    code = minidisc.main(["pydocs", "--seeds", "1,2", "--output", "out"])

    assert (code, started) == (0, ["direct", "direct"])
    shown = capsys.readouterr().out
    assert "minidisc - maxidisc's best, points: -1.50 (95 %: -1.50 to -1.50)" in shown
    grid = "[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]"
    assert f"| pydocs, teacher 4x192, grid {grid}, 200 steps, 2 rank(s) |" in shown


def test_missing_data_is_named_before_anything_is_started(benchmark_root, capsys):
    code = minidisc.main(["sst2", "--data", "nowhere"])

    assert code == 1
    assert "nowhere/glue/SST-2 does not exist" in capsys.readouterr().err


def test_an_unknown_task_is_refused(capsys):
    with pytest.raises(SystemExit):
        minidisc.parse(["sst3"])

    assert "there is no task 'sst3'; known: pydocs, clinc150, sst2" in capsys.readouterr().err
