"""The plan of the evidence: equal costs, stored cells, and problems that are said first."""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace

import evidence
import evidence_checks
import pytest
from evidence_cells import SAME_RUN, Cell, Stored, TeacherGate, read_stored
from evidence_comparisons import COMPARISONS
from evidence_run import Planned
from launching import RunFailedError
from stored_cells import FEW, bench_of


def cell(arm: str, cost: float, *, fixed: float = 0.0, seed: int = 1) -> Cell:
    return Cell(
        arm=arm,
        seed=seed,
        basis="steps",
        score=50.0,
        divergence=None,
        steps=100,
        cpu_seconds=cost,
        teacher_rows=0,
        details={"fixed_cpu_seconds": fixed},
    )


def stored_of(*cells: Cell) -> Stored:
    return Stored(
        comparison="skdbert", setting=FEW.name, settings="x", start="y", metric="z", cells=cells
    )


def test_a_cell_at_equal_cost_takes_the_steps_that_the_reference_pays_for():
    stored = stored_of(
        cell("ours", 100), cell("twice", 200), cell("same", 105), cell("first", 150, fixed=50)
    )

    assert evidence.cost_share(stored, "ours", "ours") is None
    assert evidence.cost_share(stored, "twice", "ours") == 0.5
    assert evidence.cost_share(stored, "same", "ours") == 1.0
    assert evidence.cost_share(stored, "first", "ours") == 0.5


def test_an_arm_that_is_too_dear_before_its_first_step_has_no_cell_at_equal_cost():
    stored = stored_of(cell("ours", 100), cell("dear", 300, fixed=99))

    assert evidence.cost_share(stored, "dear", "ours") is None
    assert evidence.cost_share(stored, "not yet run", "ours") is None


def test_cost_is_the_median_over_the_seeds_that_both_arms_have():
    stored = stored_of(
        *(cell("ours", 100, seed=seed) for seed in (1, 2, 3)),
        *(cell("other", cost, seed=seed) for seed, cost in enumerate((400, 200, 250, 1), start=1)),
        *(cell("alike", cost, seed=seed) for seed, cost in enumerate((80, 105, 104), start=1)),
    )

    assert evidence.cost_share(stored, "other", "ours") == 0.4
    assert evidence.cost_share(stored, "alike", "ours") == 1.0


def test_equal_cost_begins_when_all_seeds_have_their_costs(tmp_path, monkeypatch):
    ran, arms = [], COMPARISONS["skdbert"].arms

    def cells_of(seed: int) -> list[Cell]:
        return [dataclasses.replace(cell(arm, 100, seed=seed), max_steps=400) for arm in arms]

    gate = TeacherGate(teacher="six", seed=2, scores=(), final=0.0)
    finished = stored_of(*cells_of(1), *cells_of(2))
    monkeypatch.setattr(evidence, "_run_seed", lambda *given: ran.append(given[3:]) or finished)
    monkeypatch.setattr(evidence, "taught", lambda *given: ran.append(given[2:]) or gate)
    monkeypatch.setattr(evidence, "cached", lambda *given: None)
    asked = argparse.Namespace(jobs=1, groups=None, quick=False)

    evidence.run_comparison(asked, bench_of(tmp_path), stored_of(*cells_of(1)), (1, 2))

    # Seed 1 has all of its cells, so that only seed 2 needs teachers; the largest is the first.
    teachers = [(name, 2) for name in ("six", "four", "two", "one")]
    assert ran == [*teachers, (1, "steps"), (2, "steps"), (1, "cost"), (2, "cost")]


def test_a_lesser_control_has_no_cell_at_equal_cost(tmp_path):
    arms = ("soft", "random soft", "random hard", "only soft_target_kl", "only hidden_mse")
    stored = stored_of(*(cell(arm, 100) for arm in arms))
    stored = dataclasses.replace(stored, comparison="selection")

    _, left = evidence.known_and_left(bench_of(tmp_path), stored, 1, arms, "cost")

    assert [run.name for run in left] == ["random soft", "only soft_target_kl"]


def test_a_stored_cell_is_run_again_only_with_other_steps(tmp_path):
    bench, arms = bench_of(tmp_path), ("uniform, T 1", "takd, T 1", "mean, T 1", "labels")
    ours, takd, mean = (
        dataclasses.replace(cell(arm, cost), max_steps=400)
        for arm, cost in zip(arms, (100, 200, 105), strict=False)
    )
    stored = stored_of(ours, takd, mean)

    known, left = evidence.known_and_left(bench, stored, 1, arms, "steps")
    assert ([c.arm for c in known], [run.name for run in left]) == ([*arms[:3]], ["labels"])

    known, left = evidence.known_and_left(bench, stored, 1, arms[:3], "cost")
    assert known == [dataclasses.replace(mean, basis="cost")]
    assert [(run.name, run.steps) for run in left] == [("takd, T 1", 200)]

    paid = dataclasses.replace(takd, basis="cost", max_steps=200)
    known, left = evidence.known_and_left(bench, stored_of(ours, takd, paid), 1, arms[:2], "cost")
    assert (known, left) == ([paid], [])


def test_a_cell_that_fails_does_not_keep_the_others_from_being_stored(tmp_path, monkeypatch):
    def run(bench, comparison, planned: Planned) -> Cell:
        if planned.name == "mean, T 1":
            raise RunFailedError("mean, T 1: exit code 1")
        return cell(planned.name, 100)

    monkeypatch.setattr(evidence, "run_cell", run)
    given, arms = argparse.Namespace(stored=tmp_path, jobs=2), ["mean, T 1", "takd, T 1", "labels"]

    with pytest.raises(RunFailedError, match="mean, T 1"):
        evidence._run_arms(given, bench_of(tmp_path), stored_of(), 1, arms, "steps")

    (path,) = tmp_path.glob("*.json")
    assert {*read_stored(path).arms()} == {*arms[1:]}


def test_the_arm_that_takes_longest_is_begun_first(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        evidence, "run_cell", lambda bench, _, run: ran.append(run.name) or cell(run.name, 9)
    )
    known = stored_of(cell("mean, T 1", 100), cell("takd, T 1", 200), cell("labels", 50))
    given, arms = argparse.Namespace(stored=tmp_path, jobs=1), ["labels", "mean, T 1", "takd, T 1"]

    evidence._run_arms(given, bench_of(tmp_path), known, 2, arms, "steps")

    assert ran == ["takd, T 1", "mean, T 1", "labels"]


def trial(chosen: float, **scores: float) -> Stored:
    """A cell of MiniDisc at 0.9 whose first trial has these scores; other cells by `stored_of`."""
    details = {f"trial score {name[1:]}": score for name, score in scores.items()}
    made = dataclasses.replace(cell("minidisc, 0.9", 100), details={**details, "chosen": chosen})
    return dataclasses.replace(stored_of(made), comparison="minidisc")


SCORES = {"s0.5": 0.9, "s0.7": 0.88, "s0.85": 0.83, "s0.9": 0.7}


@pytest.mark.parametrize(
    ("arm", "is_same"),
    [
        ("lambda 0, 0.9", False),  # chooses 0.5
        ("lambda 0.4, 0.9", True),
        ("target barred, 0.9", True),
        ("direct, 0.9", False),
    ],
)
@pytest.mark.parametrize("basis", ["steps", "cost"])
def test_an_arm_with_the_choice_of_the_reference_is_a_copy_of_its_cell(arm, is_same, basis):
    stored = trial(chosen=0.85, **{**SCORES, "s0.85": 0.87})

    copy = evidence.copied(stored, arm, 1, basis)

    assert (copy is not None) == is_same
    if copy is not None:
        assert (copy.arm, copy.basis, copy.score) == (arm, basis, 50.0)
        assert copy.details[SAME_RUN]


def test_a_target_that_is_barred_is_no_copy_of_a_run_that_it_has_won():
    stored = trial(chosen=0.9, **{**SCORES, "s0.9": 0.89})

    assert evidence.copied(stored, "target barred, 0.9", 1, "steps") is None
    assert evidence.copied(stored, "lambda 0.4, 0.9", 1, "steps") is not None


def test_quick_trains_the_method_plain_distillation_and_labels_of_one_group(tmp_path):
    quick = evidence.parse(["--quick", "--out", str(tmp_path)])

    arms = evidence._chosen_arms(quick, stored_of())

    assert arms == ["uniform, T 1", "best teacher, T 1", "labels"]
    assert quick.only == ["selection", "minidisc"]
    assert len(evidence._chosen_arms(evidence.parse([]), stored_of())) > len(arms)


def test_a_missing_data_file_is_named_before_the_first_cell(tmp_path, capsys):
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--only", "selection"]

    assert evidence.main(words) == 1
    assert "clinc150/data_full.json" in capsys.readouterr().err


def test_groups_that_a_comparison_does_not_have_are_named(tmp_path, capsys):
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--groups", "0.97"]

    assert evidence.main([*words, "--only", "skdbert"]) == 1
    message = capsys.readouterr().err
    assert "skdbert has no arms of the groups 0.97" in message
    assert "T 1, T 4" in message


def test_a_full_disk_is_said_before_the_first_cell(tmp_path, capsys, monkeypatch):
    (tmp_path / "clinc150").mkdir()
    (tmp_path / "clinc150/data_full.json").write_text("{}")
    usage = SimpleNamespace(free=10**9)
    monkeypatch.setattr(evidence_checks.shutil, "disk_usage", lambda _: usage)
    words = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]

    assert evidence.main([*words, "--only", "skdbert", "--settings", "clinc150-few"]) == 1
    message = capsys.readouterr().err
    assert "1.0 GB free" in message
    assert "20 teachers" in message
