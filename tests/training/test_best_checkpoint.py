"""The best evaluation's weights belong to the state that a run is resumed from."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megakd.contract.stage import Verdict
from megakd.errors import MegakdError
from megakd.storage.atomic import json_text
from megakd.storage.folders import CHECKSUMS, sealed_folder
from megakd.training.best_checkpoint import BestCheckpoint, BestCheckpoints


def best_of(tmp_path: Path) -> BestCheckpoint:
    def write(folder: Path, record: Mapping[str, Any]) -> None:
        with sealed_folder(folder) as temporary:
            (temporary / "weights").write_text(str(record["step"]))
            (temporary / "best.json").write_text(json_text(record))

    return BestCheckpoint(folder=tmp_path / "best", write=write)


def considered(best: BestCheckpoint, step: int, score: float) -> bool:
    return best.consider(step, score, {"scored": step})


def evaluated(best: BestCheckpoint, scores: Mapping[int, float]) -> BestCheckpoint:
    for step, score in scores.items():
        considered(best, step, score)
    return best


def weights(tmp_path: Path) -> str | None:
    path = tmp_path / "best" / "weights"
    return path.read_text() if path.exists() else None


def test_the_best_evaluation_is_kept_and_a_tie_keeps_the_earlier(tmp_path):
    best = evaluated(best_of(tmp_path), {3: 0.5, 6: 0.7, 9: 0.7, 12: 0.6})

    assert (best.step, weights(tmp_path)) == (6, "6")
    assert best.record() == {"step": 6, "score": 0.7, "evaluation": {"scored": 6}}


def test_a_score_that_is_no_number_never_wins(tmp_path):
    assert best_of_stage(tmp_path).kept() is None
    assert evaluated(best_of(tmp_path), {3: math.nan, 6: 0.1, 9: math.nan}).step == 6


# 3: the evaluation is at the very step of the checkpoint
@pytest.mark.parametrize(("step", "score"), [(4, 0.7), (3, 0.7), (4, math.inf), (4, -math.inf)])
def test_a_run_that_goes_on_has_its_best(tmp_path, score, step):
    evaluated(best_of(tmp_path), {3: score})
    best = best_of(tmp_path)

    best.resume(step, best_step=3)

    assert (best.step, best.score) == (3, score)
    assert not considered(best, 6, score)
    assert weights(tmp_path) == "3"
    assert considered(best, 9, 100.0) is (score < 100)


@pytest.mark.parametrize(
    ("before", "step", "best_step"),
    [
        ({3: 0.5, 6: 0.7}, 0, None),
        ({3: 0.5, 6: 0.7}, 5, 3),
        ({0: 0.9}, 0, None),  # of a start without a checkpoint: the config may have changed since
    ],
)
def test_a_resume_from_before_the_best_forgets_it_and_finds_it_again(
    tmp_path, caplog, before, step, best_step
):
    evaluated(best_of(tmp_path), before)
    best = best_of(tmp_path)

    best.resume(step, best_step=best_step)

    assert (best.step, best.score, weights(tmp_path)) == (None, None, None)
    assert evaluated(best, {6: 0.7, 9: 0.6}).step == 6
    assert not caplog.text


@pytest.mark.parametrize("written", [True, False], ids=["replaced", "killed while replacing"])
def test_a_best_that_a_checkpoint_names_comes_back_if_the_run_goes_on_from_there(tmp_path, written):
    """The evaluation that was better need not be found again, for example on other ranks."""
    first = evaluated(best_of(tmp_path), {3: 0.5})
    assert first.record_step() == 3  # the checkpoint of step 5
    evaluated(first, {6: 0.7, 7: 0.8})
    if not written:
        shutil.rmtree(first.folder)
    best = best_of(tmp_path)

    assert not best.is_lost()
    best.resume(5, best_step=3)

    assert (best.step, best.score, weights(tmp_path)) == (3, 0.5, "3")
    assert evaluated(best, {6: 0.4, 9: 0.6}).step == 9


def test_a_replaced_best_is_kept_until_a_checkpoint_names_the_next(tmp_path):
    best = evaluated(best_of(tmp_path), {3: 0.5})
    folders = [best.record_step() and evaluated(best, {6: 0.7}).before.exists()]
    for _ in range(2):
        best.record_step()
        folders.append(best.before.exists())
    assert folders == [True, True, False]  # the first checkpoint was not yet complete

    assert evaluated(best, {9: 0.9}).before.exists()
    assert best.kept() is not None
    assert not best.before.exists()


def test_a_kill_while_the_best_is_replaced_brings_the_old_one_back(tmp_path):
    evaluated(best_of(tmp_path), {3: 0.5})
    os.replace(tmp_path / "best", tmp_path / ".best.old")  # noqa: PTH105
    (tmp_path / ".best.new").mkdir()
    best = best_of(tmp_path)

    best.resume(4, best_step=3)

    assert (best.step, weights(tmp_path)) == (3, "3")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("best.json", text) for text in (None, "{", "[]")),
        ("best.json", '{"step": 3, "score": 1, "evaluation": 1}'),
        ("weights", None),
        (CHECKSUMS, None),
    ],
)
def test_a_best_that_is_lost_or_damaged_is_said_and_later_ones_count(
    tmp_path, caplog, name, content
):
    evaluated(best_of(tmp_path), {3: 0.9})
    (tmp_path / "best" / name).unlink()
    if content is not None:
        (tmp_path / "best" / name).write_text(content)
    best = best_of(tmp_path)

    best.resume(4, best_step=3)

    assert "best is missing or damaged (" in caplog.text
    assert ": the best evaluation, of step 3, is lost" in caplog.text
    assert (best.step, weights(tmp_path)) == (None, None)
    if name != "best.json":
        assert name in caplog.text
        left = {path.name for path in (tmp_path / "best.unused-1").iterdir()}
        assert left == {"weights", "best.json", CHECKSUMS} - {name}
    assert considered(best, 6, 0.1)


@pytest.mark.parametrize("damaged", ["weights", CHECKSUMS])
def test_a_damaged_best_of_a_stage_that_ends_is_said_and_not_taken(tmp_path, caplog, damaged):
    best = evaluated(best_of(tmp_path), {3: 0.9})
    (tmp_path / "best" / damaged).write_text("4")

    assert best.kept() is None
    assert f"({damaged}" in caplog.text or f"checksum of {damaged} differs" in caplog.text
    assert "its weights, of step 3, are not used" in caplog.text


def test_a_failed_write_keeps_the_old_best(tmp_path):
    best = evaluated(best_of(tmp_path), {3: 0.5})

    def full(folder: Path, record: Mapping[str, Any]) -> None:
        raise MegakdError("no space left")

    best.write = full
    with pytest.raises(MegakdError):
        considered(best, 6, 0.9)

    assert (best.step, best.score, weights(tmp_path)) == (3, 0.5, "3")


def test_the_best_weights_beside_another_runs_checkpoint_are_taken_over(tmp_path):
    other = evaluated(best_of(tmp_path), {3: 0.5})
    other.record_step()  # a checkpoint names the weights of step 3
    considered(other, 6, 0.9)
    best = best_of(tmp_path / "mine")

    best.take(tmp_path)
    best.resume(5, best_step=3)

    assert (best.step, best.score, weights(tmp_path / "mine")) == (3, 0.5, "3")
    assert weights(tmp_path) == "6"
    best.take(tmp_path / "mine")  # nothing to copy
    assert weights(tmp_path / "mine") == "3"


def test_best_weights_that_the_named_checkpoint_does_not_name_are_set_aside(tmp_path, caplog):
    evaluated(best_of(tmp_path / "mine"), {2: 0.9})
    best = best_of(tmp_path / "mine")

    best.take(tmp_path)
    best.resume(5, best_step=3)

    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["best.unused-1"]
    assert best.step is None
    assert "the best evaluation, of step 3, is lost" in caplog.text


def test_weights_that_the_newest_complete_checkpoint_names_stay_while_one_is_written(tmp_path):
    """The checkpoint that is being written names those of step 6, the one before those of 3."""
    seen = []
    best = evaluated(best_of(tmp_path), {3: 0.5})
    best.record_step()
    best.settle = lambda: seen.append((tmp_path / "best.before" / "weights").read_text())
    considered(best, 6, 0.7)
    best.record_step()

    considered(best, 9, 0.9)

    assert seen == ["3"]


def best_of_stage(tmp_path: Path) -> BestCheckpoints:
    write = best_of(tmp_path).write
    return BestCheckpoints(tmp_path, write, ("wide", "target"))


def judged(bests: BestCheckpoints, evaluations: Mapping[int, tuple[float, float, str]]) -> None:
    """By step: the evaluation's score, the target's, and the view that is chosen."""
    for step, (score, target, view) in evaluations.items():
        scores = {"wide": {"accuracy": score}, "target": {"accuracy": target}}
        bests.consider(step, scores, Verdict(score, view, {"target": target}))


@pytest.mark.parametrize(
    ("evaluations", "view", "compared", "step"),
    [
        # A target is given as it was at its own best evaluation.
        (
            {3: (0.7, 0.9, "wide"), 6: (0.8, 0.6, "target"), 9: (0.5, 0.9, "target")},
            *("target", 0.6, 3),
        ),
        # Another view is given as it was when it was chosen.
        ({3: (0.7, 0.9, "target"), 6: (0.8, 0.6, "wide")}, *("wide", 0.8, 6)),
    ],
    ids=["target", "another view"],
)
def test_a_stage_gives_the_best_of_the_view_that_is_chosen(
    tmp_path, evaluations, view, compared, step
):
    bests = best_of_stage(tmp_path)
    judged(bests, evaluations)

    kept = bests.kept()

    assert (kept.chosen.view, kept.chosen.metrics) == (view, {"accuracy": compared})
    assert kept.evaluation.metrics == {"accuracy": 0.9 if view == "target" else compared}
    assert (kept.folder / "weights").read_text() == str(step)


def test_a_resume_forgets_every_best_that_comes_after_it_and_has_those_before_it(tmp_path):
    bests = best_of_stage(tmp_path)
    judged(bests, {3: (0.7, 0.6, "target")})
    steps = bests.steps()
    judged(bests, {6: (0.6, 0.8, "target")})
    again = best_of_stage(tmp_path)

    again.resume(4, steps)

    assert again.steps() == steps == {"best": 3, "best-wide": None, "best-target": 3}
    judged(again, {6: (0.6, 0.8, "target")})
    kept = again.kept()
    assert (kept.folder / "weights").read_text() == "6"
