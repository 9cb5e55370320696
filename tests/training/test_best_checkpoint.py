"""The best evaluation's weights belong to the checkpoint that a run goes on from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megakd.errors import MegakdError
from megakd.models.views import Cut, UnitOrder, View
from megakd.process.seals import write_finished
from megakd.stage import Verdict
from megakd.training.best import Best, Evaluation
from megakd.training.checkpoint import check_plain


def best_of(folder: Path, *views: str) -> Any:
    def write(to: Path, evaluation: Evaluation) -> None:
        write_finished(to, {"weights": to.name, "view": str(evaluation.view)})

    return Best(folder, write, views)


def evaluated(best: Any, scores: Mapping[int, float]) -> Any:
    for step, score in scores.items():
        best.consider(step, Evaluation({"": {"accuracy": score}}, ""), Verdict(score, ""))
    return best


def stored(folder: Path, name: str = "best") -> list[str]:
    return sorted(path.name for path in (folder / name).glob("*"))


def step_of(best: Any) -> int | None:
    folder, *_ = best.returned()
    return folder and int((folder / "weights").read_text()[5:])


def test_the_best_stays_a_tie_keeps_the_earlier_and_what_is_no_number_never_wins(tmp_path):
    assert step_of(best_of(tmp_path)) is None
    scores = {3: math.nan, 6: 0.7, 9: 0.7, 12: 0.6, 15: math.nan}

    best = evaluated(best_of(tmp_path), scores)

    assert (step_of(best), stored(tmp_path)) == (6, ["step-6"])
    assert best.returned()[2].metrics == {"accuracy": 0.7}


def test_the_log_tells_of_which_step_the_result_is_if_the_last_was_worse(tmp_path, caplog):
    caplog.set_level("INFO")
    best = best_of(tmp_path / "student")

    evaluated(best, {3: 0.5, 6: 0.7}).returned()
    assert caplog.text == ""
    evaluated(best, {9: 0.6}).returned()
    assert "student: returns the best evaluation, step 6" in caplog.text


@pytest.mark.parametrize("score", [0.7, math.inf, -math.inf])
def test_a_run_that_goes_on_has_its_best(tmp_path, score):
    best, state = best_of(tmp_path), evaluated(best_of(tmp_path), {3: score}).state_dict()
    best.load_state_dict(state)

    assert step_of(evaluated(best, {6: score})) == 3
    assert step_of(evaluated(best, {9: 100.0})) == (9 if score < 100 else 3)


@pytest.mark.parametrize(
    "cut", [None, Cut(None, View((1,), (2, 3))), Cut(UnitOrder(((1, 0),), ()), None)], ids=str
)
def test_an_evaluation_is_read_as_a_checkpoint_stores_it(cut):
    scores = {"wide": {"accuracy": 0.5}, "narrow": {"accuracy": 0.25, "x": math.inf}}
    evaluation = Evaluation(scores, "narrow", cut)
    check_plain(evaluation.record())

    assert Evaluation.read(evaluation.record()) == evaluation
    assert evaluation.metrics == scores["narrow"]


def test_weights_that_no_checkpoint_knows_are_removed(tmp_path):
    """Those of a start without a checkpoint may be of another length."""
    evaluated(best_of(tmp_path), {3: 0.5})
    best = best_of(tmp_path)
    best.remove()
    assert (step_of(best), stored(tmp_path)) == (None, [])
    assert step_of(evaluated(best, {3: 0.1})) == 3


@pytest.mark.parametrize("saved", ["step-5", "step-5.partial"])
def test_the_best_of_a_checkpoint_stays_while_the_checkpoint_stays(tmp_path, saved):
    """The evaluation that was better need not be found again, for example on other ranks."""
    best = evaluated(best_of(tmp_path), {3: 0.5, 4: 0.6})
    state = best.state_dict()
    (tmp_path / saved).mkdir()
    evaluated(best, {6: 0.7, 7: 0.8})
    assert stored(tmp_path) == ["step-4", "step-7"]

    again = best_of(tmp_path)
    again.load_state_dict(state)

    assert (step_of(again), stored(tmp_path)) == (4, ["step-4"])
    (tmp_path / saved).rmdir()
    assert stored(tmp_path) != stored(evaluated(again, {9: 0.9})._folder)
    assert stored(tmp_path) == ["step-9"]


def test_a_failed_write_keeps_the_old_best(tmp_path):
    best = evaluated(best_of(tmp_path), {3: 0.5})

    def full(*_: object) -> None:
        raise MegakdError("no space left")

    best._write = full
    with pytest.raises(MegakdError):
        evaluated(best, {6: 0.9})
    assert (step_of(best), stored(tmp_path)) == (3, ["step-3"])


@pytest.mark.parametrize(
    ("evaluations", "view", "compared", "step"),
    [
        # A target is given as it was at its own best evaluation.
        (((0.7, 0.9, "wide"), (0.8, 0.6, "target"), (0.5, 0.9, "target")), "target", 0.6, 3),
        # Another view is given as it was when it was chosen.
        (((0.7, 0.9, "target"), (0.8, 0.6, "wide")), "wide", 0.8, 6),
    ],
)
def test_a_stage_gives_the_best_of_the_view_that_is_chosen(
    tmp_path, evaluations, view, compared, step
):
    bests = best_of(tmp_path, "wide", "target")
    for number, (score, target, chosen) in enumerate(evaluations, 1):
        scores = {"wide": {"accuracy": score}, "target": {"accuracy": target}}
        verdict = Verdict(score, chosen, {"target": target})
        bests.consider(3 * number, Evaluation(scores, chosen), verdict)

    _, decisive, evaluation = bests.returned()

    assert (decisive.view, decisive.metrics) == (view, {"accuracy": compared})
    assert evaluation.metrics == {"accuracy": 0.9 if view == "target" else compared}
    assert step_of(bests) == step
