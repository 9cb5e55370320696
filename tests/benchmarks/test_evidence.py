"""The evidence: valid arms, runs that are done once, equal costs, scores and the printed table."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys

import numpy as np
import pytest
from tiny_runs import bert, review_task, write_config
from whole_run import finish_in, read

from evidence import __main__ as evidence
from evidence import run as evidence_run
from evidence.comparisons import COMPARISONS, KINDS
from evidence.run import Bench, Cell, accuracy, cell_config, cost_share, mean_divergence
from evidence.settings import SETTINGS, read_table
from evidence.table import holm, paired, table
from lib.launching import RunFailedError, UnusableError, records_of
from megakd.config.file import load_config

FEW = dataclasses.replace(SETTINGS["clinc150-few"], label_rate=2e-4, cut_label_rate=2e-4)
"""A setting whose students all learn from labels at the same rate."""


def bench_of(folder) -> Bench:
    return Bench(setting=FEW, folder=folder, encoder="some/encoder")


def cell(arm, seed=1, basis="steps", *, score=50.0, cost=100.0, **details) -> Cell:
    return Cell(
        arm=arm, seed=seed, basis=basis, score=score, divergence=0.25, steps=400, cpu_seconds=cost,
        details=details,
    )  # fmt: skip


def by_key(*cells: Cell) -> dict:
    return {(one.arm, one.seed, one.basis): one for one in cells}


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_arm_is_a_valid_config_of_the_same_rows_and_optimizer(tmp_path, name):
    bench, comparison = bench_of(tmp_path), COMPARISONS[name]
    cells = by_key(cell("soft", **dict.fromkeys(KINDS, 0.4)))
    configs = {}
    for arm in comparison.arms:
        tree = cell_config(bench, comparison.arms[arm], 9, 1, cells)
        path = write_config(tmp_path / "run.yaml", {"output_dir": str(tmp_path / "run"), **tree})
        configs[arm] = load_config(path)

    def trained(*, by_labels: bool) -> set:
        return {c.train for arm, c in configs.items() if arm.startswith("labels") is by_labels}

    (taught,) = trained(by_labels=False)
    assert trained(by_labels=True) == {dataclasses.replace(taught, learning_rate=2e-4)}
    assert len({(str(c.task), str(c.student.model), c.seed) for c in configs.values()}) == 1


def test_every_arm_has_a_reference_in_its_group_and_every_comparison_labels_alone():
    for comparison in COMPARISONS.values():
        references = {comparison.reference_of(arm) for arm in comparison.arms}
        assert references <= comparison.arms.keys()
        assert all(comparison.reference_of(one) == one for one in references)
        assert {*comparison.quick} <= comparison.arms.keys()
        assert any(arm.startswith("labels") for arm in comparison.arms)
        assert comparison.seeds.keys() <= SETTINGS.keys()
    reference_of = COMPARISONS["skdbert"].reference_of
    assert reference_of("mean, T 4") == "uniform, T 4"
    assert reference_of("labels") == "uniform, T 1"


def test_equal_cost_is_a_share_of_the_steps_by_the_median_over_the_seeds_of_both():
    cells = by_key(
        *(cell("ours", seed) for seed in (1, 2, 3)),
        cell("twice", cost=200),
        cell("same", cost=105),
        cell("first", cost=150, fixed_cpu_seconds=50),
        cell("dear before its first step", cost=300, fixed_cpu_seconds=99),
        *(cell("other seeds", n, cost=cost) for n, cost in enumerate((400, 200, 250, 1), 1)),
        *(cell("alike", n, cost=cost) for n, cost in enumerate((80, 105, 104), 1)),
    )
    shares = {"ours": None, "dear before its first step": None, "not yet run": None}
    shares |= {"twice": 0.5, "same": 1.0, "first": 0.5, "other seeds": 0.4, "alike": 1.0}

    assert {arm: cost_share(cells, arm, "ours") for arm in shares} == shares


class Fake:
    """Stands for the runs: 100 CPU seconds each, of `dear` arms twice as much."""

    def __init__(self, monkeypatch, *, dear=(), failing=()):
        self.ran, self.taught, self.dear, self.failing = [], [], dear, failing
        monkeypatch.setattr(evidence, "run_cell", self._run)
        monkeypatch.setattr(evidence, "taught", self._teach)
        monkeypatch.setattr(evidence, "cached", lambda *_: None)

    def _run(self, bench, run) -> Cell:
        if run.arm in self.failing:
            raise RunFailedError(f"{run.arm}: exit code 1")
        self.ran.append((run.arm, run.basis, run.steps, run.folder))
        made = cell(run.arm, run.seed, run.basis, cost=200 if run.arm in self.dear else 100)
        return dataclasses.replace(made, details=dict.fromkeys(KINDS, 0.4))

    def _teach(self, bench, name, seed) -> dict:
        self.taught.append(name)
        return {"teacher": name, "seed": seed}


def compare(folder, name, seeds=(1,), *words) -> dict:
    given = evidence.parse(["--out", str(folder), "--jobs", "1", *words])
    evidence.run_comparison(given, bench_of(folder / "setting"), name, seeds)
    return json.loads(next(folder.glob(f"*/{name}-*.json")).read_text())


def test_arms_run_at_equal_steps_then_at_equal_cost_and_the_largest_teacher_is_the_first(
    tmp_path, monkeypatch, capsys
):
    fake = Fake(monkeypatch, dear=["mean, T 1"])

    stored = compare(tmp_path, "skdbert")

    arms = [*COMPARISONS["skdbert"].arms]
    assert fake.taught == ["six", "four", "two", "one"]
    assert [run[:3] for run in fake.ran[: len(arms)]] == [(arm, "steps", 400) for arm in arms]
    costs = fake.ran[len(arms) :]
    assert {run[0] for run in costs} == {arm for arm in arms if "uniform" not in arm}
    assert {run[2] for run in costs if run[0] == "mean, T 1"} == {200}
    # The run of a cell of the same steps is done already.
    folders = {run[3] for run in fake.ran}
    assert len(folders) == len(arms) + 1
    assert len(stored["cells"]) == len(fake.ran)
    assert "skdbert in clinc150-few, equal cost:" in capsys.readouterr().out


def test_quick_trains_its_arms_alone_and_an_arm_that_reads_another_comes_after_it(
    tmp_path, monkeypatch
):
    fake = Fake(monkeypatch)

    stored = compare(tmp_path, "selection", (1, 2), "--quick")
    quick = {run[0] for run in fake.ran}
    fake.ran.clear()
    compare(tmp_path / "whole", "selection")

    assert quick == {one["arm"] for one in stored["cells"]} == {*COMPARISONS["selection"].quick}
    assert fake.ran[len(COMPARISONS["selection"].arms) - 1][0] == "fixed mean weights"


def test_a_run_that_fails_does_not_keep_the_others_from_being_stored(tmp_path, monkeypatch, capsys):
    Fake(monkeypatch, failing=["T 4"])

    with pytest.raises(RunFailedError, match="T 4"):
        compare(tmp_path, "plain")

    stored = json.loads((tmp_path / "results/plain-clinc150-few.json").read_text())
    assert {one["arm"] for one in stored["cells"]} == {"T 1", "labels"}
    assert "T 4: exit code 1; the other runs go on" in capsys.readouterr().err


def test_the_table_has_means_and_paired_differences_with_their_interval():
    comparison = dataclasses.replace(COMPARISONS["plain"], seeds={})
    scores = {"T 1": (80.0, 81.0, 82.0), "T 4": (79.0, 81.5, 82.5), "labels": (70.0, 71.0, 72.5)}
    cells = by_key(
        *(cell(arm, n, score=one) for arm, some in scores.items() for n, one in enumerate(some, 1))
    )

    first, *rows = table(comparison, cells, "steps").splitlines()

    assert first.split()[:4] == ["arm", "seeds", "points", "KL"]
    # Differences -1, 0.5, 0.5: mean 0, deviation 0.866, standard error 0.5, t(0.975, 2) = 4.303.
    assert all(part in rows[1] for part in ("T 1", "+0.00", "-2.15 to +2.15"))
    # -10, -10, -9.5: p = 0.0003, the smaller of two.
    assert "-9.83" in rows[2]
    assert rows[2].split()[-1] == "0.001"
    # Intervals need two seeds.
    assert all(np.isnan([*paired([1.0]), *paired([1.0, 1.0])]))
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": float("nan")})
    tests = {"a": 0.06, "b": 0.03, "c": 0.06, "d": float("nan")}
    assert adjusted == pytest.approx(tests, nan_ok=True)


@pytest.mark.parametrize(("steps", "is_resumed"), [(4, True), (5, False)])
def test_a_run_goes_on_where_it_was_unless_its_config_has_changed(
    tmp_path, monkeypatch, steps, is_resumed
):
    ends = [sys.executable, "-c", "pass"]
    monkeypatch.setattr(evidence_run.launching, "launch_command", lambda *_: ends)
    folder = tmp_path / "cell"

    def make(steps: int) -> int:
        config = {"student": {"layers": (2, 5)}, "train": {"max_steps": steps, "rate": 1e-5}}

        def run() -> dict[str, int]:
            evidence_run.start(folder, config, program="train")
            return {"steps": steps}

        return evidence_run.once(folder / "cell.json", config, run)["steps"]

    assert make(4) == 4
    (folder / "checkpoint").touch()
    assert make(steps) == steps
    assert (folder / "checkpoint").exists() is is_resumed
    assert (folder / "process.json").is_file()


def test_scores_are_those_of_their_definitions():
    teacher, student = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    expected = 0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75)
    logits = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 9.0]])

    assert mean_divergence(teacher, student) == pytest.approx(expected)
    assert mean_divergence(teacher, teacher + 3.0) == pytest.approx(0, abs=1e-12)
    assert accuracy(logits, ["no", "yes"], ["yes", "yes", "yes"]) == pytest.approx(200 / 3)


def test_splits_are_disjoint_and_keep_every_row_text(tmp_path):
    (tmp_path / "banking77").mkdir()
    for name, count in {"train": 1100, "test": 5}.items():
        with (tmp_path / f"banking77/{name}.csv").open("w", newline="") as file:
            rows = ((f'say "{number}",\n twice', "a") for number in range(count))
            csv.writer(file).writerows([("text", "category"), *rows])

    SETTINGS["banking77-few"].write_splits(tmp_path, tmp_path / "out")

    train, held, test = (
        read_table(tmp_path / f"out/{split}.csv", ("text", "label"))
        for split in ("train", "validation", "test")
    )
    assert [len(rows) for rows in (train, held, test)] == [100, 1000, 5]
    assert not {*train} & {*held}
    assert test[3][0] == 'say "3",\n twice'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--jobs 0", "'0' is no integer above zero"),
        ("--seeds 1,x", "'1,x' is no list such as 1,2,3"),
        ("--seeds 1,2,1", "'1,2,1' names something twice"),
        ("--only plane", "'plane' is none of plain, skdbert"),
    ],
)
def test_an_unusable_option_is_refused_with_its_value(capsys, words, message):
    with pytest.raises(SystemExit):
        evidence.main(words.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only selection", "clinc150/data_full.json"),
        ("--only plain --settings sst2-few", "sst2-few: plain is compared in clinc150"),
    ],
)
def test_what_cannot_be_run_is_said_before_the_first_run(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(evidence, "run_comparison", lambda *_: pytest.fail("has begun"))
    with pytest.raises(UnusableError, match=message):
        evidence.main([*words.split(), "--data", str(tmp_path), "--out", str(tmp_path)])


@pytest.mark.slow
def test_labels_alone_learn_from_the_rows_with_a_label_in_a_cut_of_the_target(one_rank, tmp_path):
    model = {"model": bert(2, width=32, num_attention_heads=4)}
    train = {"per_device_train_batch_size": 8, "max_steps": 4}
    task = review_task(tmp_path)
    finish_in(one_rank, tmp_path / "teacher", task, student=model, train=train)
    cut = {"target_sparsity": 0.75, "round_to": 1}
    finish_in(
        one_rank,
        tmp_path,
        {**task, "labelled_examples": 8},
        teacher={"model": str(tmp_path / "teacher/out/final")},
        student={"model": "from_teacher"},
        method={"name": "evidence_labels:Labels", **cut},
        log={"logging_steps": 1},
        train=train,
    )

    out = tmp_path / "out"
    assert [one["name"] for one in read(out)["stages"]] == ["sorted-teacher", "student"]
    # Each of the 4 steps takes all 8 rows that have a label.
    assert max(record["epoch"] for record in records_of(out) if "epoch" in record) == 4.0
    assert json.loads((out / "final/config.json").read_text())["model_type"] == "narrow_bert"
