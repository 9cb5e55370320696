"""The runs of the evidence: their order, gates that fail, and problems that are said first."""

from __future__ import annotations

import argparse
import dataclasses
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import evidence
import evidence_checks
import evidence_plan
import pytest
from evidence_cells import Cell, Stored, TeacherGate, read_stored, write_stored
from evidence_comparisons import COMPARISONS
from evidence_run import Planned
from launching import RunFailedError
from stored_cells import FLAT, bench_of, one_cell, stored_of

if TYPE_CHECKING:
    from pathlib import Path


class Fake:
    """Stands for the runs of SKDBERT, of 100 CPU seconds each; `scores` are those of the arms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **scores: float) -> None:
        self.scores, self.ran, self.taught = scores, list[tuple[str, int, str]](), list[Any]()
        monkeypatch.setattr(evidence, "run_cell", self._run)
        monkeypatch.setattr(evidence, "taught", self._teach)
        monkeypatch.setattr(evidence, "cached", lambda *given: None)

    def _run(self, bench: object, comparison: object, run: Planned) -> Cell:
        self.ran.append((run.name, run.seed, run.basis))
        score = self.scores.get(run.name.replace(", ", "_").replace(" ", "_"), 50.0)
        made = one_cell(run.name, 100, seed=run.seed)
        return dataclasses.replace(made, score=score, max_steps=run.steps)

    def _teach(self, bench: object, setting: object, name: str, seed: int) -> TeacherGate:
        self.taught.append((name, seed))
        return TeacherGate(teacher=name, seed=seed, scores=FLAT, final=80.0)


GATING = {"best teacher, T 1", "best teacher, T 4", "labels"}


def run_skdbert(
    folder: Path, stored: Stored, seeds: tuple[int, ...], groups: tuple[str, ...] | None = None
) -> Stored:
    asked = argparse.Namespace(jobs=1, groups=groups, quick=False, stored=folder)
    evidence.run_comparison(asked, bench_of(folder), stored, seeds)
    (path,) = folder.glob("*.json")
    return read_stored(path)


def test_a_group_whose_gate_has_failed_is_not_trained(tmp_path, monkeypatch, capsys):
    fake = Fake(monkeypatch, best_teacher_T_1=60.0, best_teacher_T_4=49.0)

    run_skdbert(tmp_path, stored_of(), (1, 2))

    first = fake.ran[: 2 * len(GATING)]
    assert {*first} == {(arm, seed, "steps") for arm in GATING for seed in (1, 2)}
    rest = {arm for arm, _, _ in fake.ran[len(first) :]}
    assert rest == {arm for arm in COMPARISONS["skdbert"].arms if arm.endswith("T 1")} - GATING
    assert "no run of uniform, T 4 and its controls, because a gate" in capsys.readouterr().out


def test_the_gates_of_one_group_need_the_arms_without_a_group(tmp_path, monkeypatch):
    fake = Fake(monkeypatch, labels=40.0)

    run_skdbert(tmp_path, stored_of(), (1, 2), groups=("T 4",))

    wanted = {arm for arm in COMPARISONS["skdbert"].arms if arm.endswith("T 4")}
    assert {arm for arm, _, _ in fake.ran} == wanted | {"labels"}


def test_one_seed_alone_says_nothing_about_a_gate_and_trains_all_arms(tmp_path, monkeypatch):
    fake = Fake(monkeypatch)

    run_skdbert(tmp_path, stored_of(), (1,))

    assert {arm for arm, _, _ in fake.ran} == {*COMPARISONS["skdbert"].arms}


def test_teachers_are_trained_for_the_seeds_that_need_them_and_the_largest_is_the_first(
    tmp_path, monkeypatch
):
    fake = Fake(monkeypatch, labels=40.0)
    finished = run_skdbert(tmp_path, stored_of(), (1,))
    fake.taught.clear()

    run_skdbert(tmp_path, finished, (1, 2))

    assert fake.taught[:4] == [(name, 2) for name in ("six", "four", "two", "one")]
    assert {seed for _, seed in fake.taught} == {2}


def test_equal_cost_begins_when_all_seeds_have_their_costs(tmp_path, monkeypatch):
    fake = Fake(monkeypatch, labels=40.0)
    begun = []
    cost = evidence_plan.cost_share
    monkeypatch.setattr(
        evidence_plan, "cost_share", lambda *given: begun.append(len(fake.ran)) or cost(*given)
    )

    run_skdbert(tmp_path, stored_of(), (1, 2))

    assert {*begun} == {2 * len(COMPARISONS["skdbert"].arms)}


def test_a_cell_that_fails_does_not_keep_the_others_from_being_stored(
    tmp_path, monkeypatch, capsys
):
    def run(bench, comparison, planned: Planned) -> Cell:
        if planned.name == "mean, T 1":
            raise RunFailedError("mean, T 1: exit code 1")
        return one_cell(planned.name, 100)

    monkeypatch.setattr(evidence, "run_cell", run)
    given, arms = argparse.Namespace(stored=tmp_path, jobs=2), ["mean, T 1", "takd, T 1", "labels"]

    with pytest.raises(RunFailedError, match="mean, T 1"):
        evidence._run_arms(given, bench_of(tmp_path), stored_of(), [1], arms, "steps")

    (path,) = tmp_path.glob("*.json")
    assert {*read_stored(path).arms()} == {*arms[1:]}
    assert "mean, T 1: exit code 1; the other runs go on" in capsys.readouterr().err


def test_the_arm_that_takes_longest_is_begun_first(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        evidence, "run_cell", lambda bench, _, run: ran.append(run.name) or one_cell(run.name, 9)
    )
    known = stored_of(
        one_cell("mean, T 1", 100), one_cell("takd, T 1", 200), one_cell("labels", 50)
    )
    given, arms = argparse.Namespace(stored=tmp_path, jobs=1), ["labels", "mean, T 1", "takd, T 1"]

    evidence._run_arms(given, bench_of(tmp_path), known, [2], arms, "steps")

    assert ran == ["takd, T 1", "mean, T 1", "labels"]


def test_the_runs_of_all_seeds_wait_in_one_queue(tmp_path, monkeypatch):
    side_by_side = threading.Barrier(2, timeout=30)

    def run(bench, comparison, planned: Planned) -> Cell:
        side_by_side.wait()
        return one_cell(planned.name, 100, seed=planned.seed)

    monkeypatch.setattr(evidence, "run_cell", run)
    given = argparse.Namespace(stored=tmp_path, jobs=2)

    stored = evidence._run_arms(given, bench_of(tmp_path), stored_of(), [1, 2], ["labels"], "steps")

    assert stored.of("labels").keys() == {1, 2}


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "'0' is no integer above zero"),
        (["--seeds", "1,x"], "'1,x' is no list such as 1,2,3"),
        (["--seeds", "1,2,1"], "'1,2,1' names something twice"),
        (["--only", "plain,plain"], "'plain,plain' names something twice"),
        (["--only", "plane"], "'plane' is none of plain, skdbert"),
    ],
)
def test_an_unusable_option_is_refused_with_its_value(capsys, words, message):
    with pytest.raises(SystemExit):
        evidence.main(words)

    assert message in capsys.readouterr().err


def test_a_setting_outside_the_plan_is_trained_only_if_it_is_named():
    def settings(*words: str) -> set[str]:
        return {setting.name for _, setting, _ in evidence.chosen(evidence.parse([*words]))}

    assert "clinc150-few" in settings()
    assert "clinc150-few-10-epochs" not in settings()
    assert settings("--settings", "clinc150-few-10-epochs") == {"clinc150-few-10-epochs"}


def test_a_comparison_that_is_not_made_in_a_setting_is_named_with_its_settings(tmp_path, capsys):
    words = ["--only", "plain", "--settings", "sst2-few", "--out", str(tmp_path / "out")]

    assert evidence.main(words) == 1
    message = "nothing to run in sst2-few: plain is compared in clinc150"
    assert message in capsys.readouterr().err


def test_cells_of_another_setting_are_refused_before_any_comparison_begins(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(evidence, "run_comparison", lambda *given: pytest.fail("has begun"))
    stale = dataclasses.replace(stored_of(), comparison="minidisc", settings="old")
    write_stored(tmp_path / "evidence", stale)
    words = ["--only", "skdbert,minidisc", "--settings", "clinc150-few"]

    assert evidence.main([*words, "--stored", str(tmp_path / "evidence")]) == 1
    message = capsys.readouterr().err
    assert "the cells of minidisc in the setting clinc150-few belong to the settings old" in message


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
    assert "12 teachers" in message
