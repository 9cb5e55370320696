"""The runs of the evidence: their order, gates that fail, and problems that are said first."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
from stored_cells import FLAT, bench_of, one_cell, stored_of

from evidence import __main__ as evidence
from evidence.cells import Cell, Stored, TeacherGate, read_stored, write_stored
from evidence.comparisons import COMPARISONS
from evidence.run import Planned
from lib.launching import RunFailedError, UnusableError

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


def run_skdbert(folder: Path, stored: Stored, seeds: tuple[int, ...]) -> Stored:
    asked = argparse.Namespace(jobs=1, quick=False, stored=folder)
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


def test_teachers_are_trained_for_the_seeds_that_need_them_and_the_largest_is_the_first(
    tmp_path, monkeypatch
):
    fake = Fake(monkeypatch, labels=40.0)
    finished = run_skdbert(tmp_path, stored_of(), (1,))
    fake.taught.clear()

    run_skdbert(tmp_path, finished, (1, 2))

    assert fake.taught[:4] == [(name, 2) for name in ("six", "four", "two", "one")]
    assert {seed for _, seed in fake.taught} == {2}


def test_a_cell_that_fails_does_not_keep_the_others_from_being_stored(
    tmp_path, monkeypatch, capsys
):
    def run(bench, comparison, planned: Planned) -> Cell:
        if planned.name == "mean, T 1":
            raise RunFailedError("mean, T 1: exit code 1")
        return one_cell(planned.name, 100)

    monkeypatch.setattr(evidence, "run_cell", run)
    arms = ["mean, T 1", "uniform, T 1", "labels"]
    given = argparse.Namespace(stored=tmp_path, jobs=2)

    with pytest.raises(RunFailedError, match="mean, T 1"):
        evidence._run_arms(given, bench_of(tmp_path), stored_of(), [1], arms, "steps")

    (path,) = tmp_path.glob("*.json")
    assert {*read_stored(path).arms()} == {*arms[1:]}
    assert "mean, T 1: exit code 1; the other runs go on" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only selection", "clinc150/data_full.json"),
        ("--only plain --settings sst2-few", "sst2-few: plain is compared in clinc150"),
        ("--only skdbert,minidisc --settings clinc150-few", "minidisc.*belong to the settings old"),
    ],
)
def test_what_cannot_be_run_is_said_before_the_first_cell(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(evidence, "run_comparison", lambda *given: pytest.fail("has begun"))
    stale = dataclasses.replace(stored_of(), comparison="minidisc", settings="old")
    write_stored(tmp_path / "evidence", stale)
    folders = ["--data", str(tmp_path), "--out", str(tmp_path), "--stored", f"{tmp_path}/evidence"]

    with pytest.raises(UnusableError, match=message):
        evidence.main([*words.split(), *folders])
