"""HomoDistil's, MiniDisc's and shrink's benchmarks: valid and alike runs, right numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_books import write_real_data

from lib import books, launching
from lib.data import BOOKS
from megakd.config.file import load_config
from megakd.errors import CheckpointError
from megakd.methods.shrink import hops
from methods import homodistil, homodistil_decoder, minidisc, shrink
from methods.homodistil import Found

WORDS = ("the", "whale", "ship", "sea", "of", "a", "captain", "saw", "his", "white", "old", "cold")


@pytest.fixture
def data(tmp_path) -> Path:
    """Two books and a task, as the folder of real data has them."""
    return write_real_data(tmp_path / "data", BOOKS, WORDS)


def words(data: Path, *more: str) -> list[str]:
    out = str(data.parent / "out")
    return ["--data", str(data), "--out", out, "--quick", "--tasks", "clinc150", *more]


def test_every_run_of_homodistil_is_a_valid_config_of_the_same_text_steps_and_rate(data, load):
    given = homodistil.parse(words(data, "--seeds", "1"))
    launching.write_leg_configs(given.out, homodistil.trees(given))

    pruning = load(homodistil.pruning_legs(given))
    teachers = load(homodistil.teacher_legs(given))
    tasks = load(homodistil.task_legs(given))

    found = {name: (c.method.schedule, c.method.pruning_end) for name, c in pruning.items()}
    assert found == {
        "homodistil-1": ("cubic", None),
        "one_shot-1": ("one_shot", None),
        "one_shot_alone-1": ("one_shot", None),
        "early-1": ("cubic", given.sizes.early),
    }
    assert pruning["homodistil-1"].baselines == ("random", "alone")
    assert [name for name, c in pruning.items() if c.objective] == ["one_shot_alone-1"]
    assert len({c.train for c in pruning.values()}) == 1
    assert len({str(c.task.train_files) for c in (*pruning.values(), *teachers.values())}) == 1
    short, long = teachers.values()
    assert (short.task.max_length, long.task.max_length) == (given.sizes.short, given.sizes.length)
    assert long.student.model == str(given.out / "teacher-short" / "final")
    assert len(tasks) == 7
    assert all(c.eval.keep_best is False for c in (*pruning.values(), *tasks.values()))


def test_a_piece_of_text_is_learned_or_held_out_and_the_sample_is_held_out(data, tmp_path):
    books.write_text(data, tmp_path / "text", books.QUICK._replace(pieces=None))

    train, held_out, sample = (
        [json.loads(line)["text"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "text" / f"{n}.jsonl" for n in ("train", "held_out", "sample"))
    )
    assert not {*train} & {*held_out}
    assert len(held_out) == pytest.approx(len(train) / 19, abs=2)
    assert len(sample) >= 2
    assert all(any(piece.startswith(part) for piece in held_out) for part in sample)


def text_report(loss: float, jump: float) -> dict:
    models = {"teacher": 3.0, "student": loss, "random": 5.0, "alone": 6.0}
    stages = {"pruning-1": 3.0, "student": 4.0, "random": 6.0, "alone": 5.0}
    return {
        "evaluation_sets": {"held_out": {"metrics": {m: {"loss": x} for m, x in models.items()}}},
        "student": {"parameters": 900},
        "stages": [{"name": name, "seconds": value} for name, value in stages.items()],
        "pruning": [{"step": n, "teacher_kl": kl} for n, kl in enumerate((0.1, jump + 0.1, 0.2))],
    }


def test_the_table_has_all_seeds_gaps_and_the_largest_jumps(capsys):
    reports: dict = {"teacher": text_report(3.0, 0.0)}
    for seed in (1, 2):
        reports[f"homodistil-{seed}"] = text_report(4.0 + seed, 0.2)
        reports[f"one_shot-{seed}"] = text_report(4.5, 0.8 * seed)
        for task in ("sst2", "mrpc"):
            metrics = {"metrics": {"accuracy": 0.3 + 0.2 * seed}}
            reports[f"{task}-alone-{seed}"] = {"metric_name": "accuracy", "student": metrics}
    reports["mrpc-alone-2"] = None
    found = Found(reports, [1, 2], ["sst2", "mrpc"])

    homodistil.show(found, "python x.py")

    alone = homodistil.numbers(found, "alone")
    assert (alone["loss"], alone["seconds"]) == ([6.0, 6.0], [5.0, 5.0])
    assert alone["sst2"] == pytest.approx([50, 70])
    assert (alone["mrpc"], alone["tasks"]) == (pytest.approx([50]), pytest.approx([50]))
    assert homodistil.numbers(found, "homodistil")["seconds"] == [7.0, 7.0]
    shown = capsys.readouterr().out
    assert "5.500 ±0.707" in shown
    assert "seed 2: largest jump of the divergence: cubic 0.2000, one_shot 1.6000, ratio 8.0" in (
        shown
    )
    assert "alone tasks 50.000; jump of one_shot over cubic 4.0, 8.0" in shown


@pytest.mark.slow
def test_the_whole_chain_runs_and_a_second_start_repeats_nothing(data, run):
    options = ["--seeds", "1", "--ranks", "1", "--jobs", "1", "--no-bf16"]

    first, second = (run("methods.homodistil", *words(data, *options)) for _ in range(2))

    assert first.returncode == 0, first.stderr
    assert "teacher, held out: loss " in first.stdout
    assert "has not finished" not in first.stdout
    assert "| HomoDistil, held-out loss and mean score of the tasks |" in first.stdout
    assert "tokens/s" not in second.stdout
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]


def timed(seconds: float, **baselines: float) -> dict:
    times = {"pruning-1": seconds / 2, "student": seconds / 2, **baselines}
    return {"stages": [{"name": name, "seconds": value} for name, value in times.items()]}


def test_runs_of_the_decoder_at_equal_cost_differ_from_the_others_in_their_steps(tmp_path, load):
    out = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "1,2"]
    given = homodistil_decoder.parse([*out, "--steps", "1000"])
    launching.write_leg_configs(given.out, homodistil_decoder.trees(given))
    reports = {}
    for seed, machine in ((1, 1.0), (2, 3.0)):
        reports |= {f"{name}-{seed}": timed(95 * machine) for name in homodistil_decoder.RUNS}
        reports[f"homodistil-{seed}"] = timed(100 * machine, random=60.0, alone=40 * machine)
        reports[f"one_shot-{seed}"] = timed(80 * machine)

    short = load(homodistil_decoder.legs(given))
    steps = homodistil_decoder.steps_at_cost(Found(reports, (1, 2), ()), given.steps)
    longer = load(homodistil_decoder.cost_legs(given, steps))

    assert len({(config.train, config.task.dataset) for config in short.values()}) == 1
    assert [c.method.score for c in short.values()].count("sensitivity") == 8
    assert steps == {"one_shot": 1250, "alone": 2500}
    ours = longer["one_shot-cost-2"]
    assert ours.train.max_steps == 1250
    changes = {"train": short["one_shot-2"].train, "output_dir": short["one_shot-2"].output_dir}
    assert replace(ours, **changes) == short["one_shot-2"]
    alone = longer["homodistil-cost-1"]
    assert (alone.baselines, alone.alone.max_steps) == (("alone",), 2500)


def candidate(sparsity: float, metric: float, **more: float) -> dict:
    found = {"iteration": 1, "sparsity": sparsity, "metric": metric, "chosen": False}
    return {**found, "tradeoff": metric + 0.2 * sparsity, **more}


def scored(student: float, candidates: list[dict], *seconds: float) -> dict:
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
    scores = {0.5: 0.86, 0.7: 0.85, 0.8: 0.81, 0.9: 0.50, 0.95: 0.10}
    trial = [candidate(s, score, chosen=s == 0.7) for s, score in scores.items()]
    second = candidate(0.9, 0.61, chosen=True) | {"iteration": 2}
    return {
        "minidisc": scored(0.61, [*trial, second], 10.0, 20.0),
        "maxidisc": scored(0.625, tried, 40.0, 35.0),
        "direct": scored(0.55, [], 9.0),
    }


def test_an_outcome_of_minidisc_judges_the_choice_by_the_students_of_the_same_assistants(reports):
    found = minidisc.outcome("pydocs", 1, reports)

    assert found.teacher == pytest.approx(90.0)
    assert (found.to_best, found.to_direct) == (pytest.approx(-1.5), pytest.approx(6.0))
    assert (found.ratio, found.seconds) == (pytest.approx(30 / 75), 30.0)
    assert (found.chosen, found.best, found.regret) == (0.7, 0.8, pytest.approx(1.0))
    # Trade-offs .96 .99 1.01 .68 and students .60 .62 .63 .50 are in one order; in the trial
    # .96 .99 .97 .68 the two in the middle change places, and 0.95 has no student.
    assert (found.tried, found.in_trial) == (pytest.approx(1.0), pytest.approx(0.8))
    assert math.isnan(minidisc.correlation({0.5: 1.0, 0.7: 2.0}, {0.5: 3.0, 0.7: 3.0}))


@pytest.mark.parametrize(
    ("differences", "mean", "interval"),
    [
        ((-0.1, -0.2, -0.15), "yes", "yes"),
        ((-2.0, 0.2, 1.0), "yes", "no"),
        ((-2.0, -0.2, -1.0), "no", "no"),
        ((0.0,), "yes", "no"),
    ],
)
def test_the_difference_is_held_against_its_target_with_and_without_its_interval(
    reports, differences, mean, interval
):
    one = minidisc.outcome("pydocs", 1, reports)._replace(tried=math.nan)
    outcomes = [one._replace(to_best=difference) for difference in differences]
    told = minidisc.verdict(outcomes)
    assert f"at least -0.5: the mean {mean}, its whole interval {interval}" in told
    assert "assistants tried: not defined" in told


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A repository of its own, so that configs and runs are not written into this one."""
    monkeypatch.setattr(minidisc, "ROOT", tmp_path)
    monkeypatch.setattr(launching, "ROOT", tmp_path)
    splits = {"train": [["a", "greet"], ["b", "ask"]], "val": [["c", "ask"]], "test": []}
    (tmp_path / "data" / "clinc150").mkdir(parents=True)
    (tmp_path / "data" / "clinc150" / "data_full.json").write_text(json.dumps(splits))
    return tmp_path


def minidisc_given(*words: str):
    return minidisc.parse([*words, "--data", "data", "--output", "out"])


@pytest.mark.parametrize("task", ["pydocs", "clinc150", "sst2"])
def test_every_leg_of_minidisc_is_valid_and_differs_in_method_and_teacher_alone(root, task):
    options = "--grid 0.5,0.9 --steps 40 --teacher-steps 30 --set train.bf16=true"
    given, folder = minidisc_given(*options.split()), Path("out/minidisc") / task
    minidisc.write_configs(folder, task, given)

    teacher, *others = (
        load_config(root / leg.config, [*leg.overrides, f"output_dir={leg.output}"])
        for leg in minidisc.legs(folder, 7, given)
    )

    assert (teacher.method.name, teacher.seed, teacher.train.max_steps) == ("finetune", 7, 30)
    assert teacher.student.model.config["hidden_size"] == 192
    assert [config.method.name for config in others] == ["minidisc", "maxidisc", "direct"]
    for config in others:
        assert config.teacher.model == f"out/minidisc/{task}/teacher-seed-7/final"
        assert config.method.sparsities == (0.5, 0.9)
        assert (config.seed, config.train.max_steps, config.eval.eval_steps) == (7, 40, 20)
        assert config.train.bf16


def test_a_finished_leg_is_not_started_again_and_one_of_other_settings_is_refused(root):
    minidisc.write_configs(Path("out/minidisc/pydocs"), "pydocs", minidisc_given())
    leg = minidisc.legs(Path("out/minidisc/pydocs"), 1, minidisc_given())[0]
    output = root / leg.output
    output.mkdir(parents=True)
    (output / "config.yaml").write_text((root / leg.config).read_text() + "seed: 1\n")
    other = leg._replace(overrides=("seed=1", "train.max_steps=77"))

    assert launching.finished(leg) is None
    (output / "report.json").write_text("{}")
    assert launching.report_of(leg, ranks=1) == {}
    with pytest.raises(CheckpointError, match="finished run of another config"):
        launching.finished(other)


def shrink_given(folder: Path, *words: str):
    given = shrink.parse(["--data", str(folder), "--out", str(folder / "out"), *words])
    launching.write_config(given.out / "run.yaml", shrink.config(given))
    return given


@pytest.mark.parametrize("case", shrink.CASES)
def test_the_variants_of_shrink_are_valid_and_take_equal_steps(tmp_path, load, case):
    given = shrink_given(tmp_path, "--case", case)

    configs = load(shrink.leg(given, name, 7) for name in given.runs)

    assert len({(config.train, config.task.dataset) for config in configs.values()}) == 1
    methods = [config.method for config in configs.values()]
    assert {m.repair_steps + m.on_policy_steps for m in methods} == {400}
    assert {m.trial_steps for m in methods} == {60}
    alone = [m.candidates[0] for m in methods if len(m.candidates) == 1]
    assert alone == list(configs["shrink-7"].method.candidates)
    depths = [round(share * shrink.CASES[case].layers) for share in alone]
    assert depths == list(shrink.CASES[case].depths)
    assert configs["on_policy-7"].rollout is not None


def test_hops_take_equal_steps_and_trials_differ_in_their_length_alone(tmp_path, load):
    def methods(*words: str):
        given = shrink_given(tmp_path, *words)
        return (c.method for c in load(shrink.leg(given, n, 7) for n in given.runs).values())

    one, two = methods("--hops")
    short, long = methods("--trials", "40,120")

    assert (one.assistant, two.assistant) == ("never", "auto_2.5")
    assert len(hops(two, 260_032)) == 2
    assert one.trial_steps + one.repair_steps == 2 * (two.trial_steps + two.repair_steps)
    assert one.target_sparsity == two.target_sparsity
    assert replace(short, trial_steps=120) == long


def shrunk(loss: float, chosen: int | None, **baselines: float) -> dict:
    return {
        "teacher": {"metrics": {"loss": 1.0}},
        "student": {"metrics": {"loss": loss}},
        "baselines": {name: {"loss": value} for name, value in baselines.items()},
        "candidates": [
            {"shape": f"{layers} layers, 1 neurons", "metric": kl, "chosen": layers == chosen}
            for layers, kl in {3: 0.7, 2: 0.6}.items()
        ],
        "stages": [
            {"name": "trial-1", "seconds": 2.0, "metrics": {"loss": 4.0}},
            {"name": "student", "seconds": 3.0, "metrics": {"loss": loss}},
        ],
    }


def test_the_choice_of_shrink_is_compared_with_the_best_of_all_if_all_have_finished(
    tmp_path, capsys
):
    log = [
        {"stage": "other", "eval/layers-2/loss": 1.0},
        {"stage": "trial-1", "eval/layers-2/loss": 5.0},
        {"stage": "trial-1", "eval/layers-2/loss": 4.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    found = {"shrink": shrunk(2.0, 2, random=3.0), "layers-3": shrunk(1.5, 3), "on_policy": None}

    some = shrink.scores_of(found | {"layers-2": None}, (3, 2), tmp_path)
    every = shrink.scores_of(found | {"layers-2": shrunk(1.7, 2)}, (3, 2), tmp_path)
    shrink.show_scores([some, every], "a case", "the command", ["final/ opens"])

    assert (some.alone, every.alone) == ({}, {3: 1.5, 2: 1.7})
    assert (every.chosen, every.best_alone, every.cut, every.random) == (2, 3, 5.0, 3.0)
    assert (every.divergences, every.alone_seconds) == ({3: 0.7, 2: 0.6}, 10.0)
    assert shrink.difference([some, every], "tried") == (
        "shrink - tried +0.5000 (sd 0.0000; +0.5000)"
    )
    shown = capsys.readouterr().out
    assert "the best alone have 3; the best candidate alone in 0 of 1 seeds" in shown
    assert "; final/ opens |" in shown
