"""The gates of the evidence: where a setting cannot tell, nothing is compared, and it says why."""

from __future__ import annotations

import pytest
from stored_cells import RISING, MadeUp, cells, example, stored

from evidence.cells import TeacherGate
from evidence.statistics import CONVERGED, DISTILLS, assess, converged, distils


def teacher(*scores):
    return TeacherGate(teacher="six", seed=1, scores=scores, final=0.0)


def test_a_teacher_that_still_rises_hides_the_verdicts():
    result = assess(example(curve=RISING), MadeUp())

    assert result.differences == ()
    assert [gate.name for gate in result.groups[0].gates if gate.state == "failed"] == [CONVERGED]


@pytest.mark.parametrize(
    ("scores", "state", "rise"),
    [
        # Half a point is allowed.
        ((0.0, 0.0, 0.5), "passed", "six, seed 1: +0.50"),
        ((0.0, 0.0, 0.51), "failed", "six, seed 1: +0.51"),
        ((3.0, 2.0, 1.0), "passed", "+0.00"),
        # Of four evaluations, the last third, rounded up, is two; the best of it counts.
        ((1.0, 2.0, 5.0, 3.0), "passed", "+0.00"),
        ((1.0, 9.0, 5.0, 3.0, 7.0, 8.0), "failed", "+1.00"),
        ((1.0, 2.0, 5.0, 3.0, 7.0, 6.0, 8.0), "failed", "+1.00"),
        ((1.0, 2.0, 5.0, 3.0, 7.0, 8.0, 6.0), "failed", "+1.00"),
        ((80.0, 80.0), "failed", "six, seed 1: 2 evaluations"),
        ((), "not applicable", "no evaluation"),
    ],
)
def test_teachers_have_converged_if_their_scores_no_longer_rise_in_the_last_third(
    scores, state, rise
):
    gate = converged(stored(teachers=(teacher(*scores),)))
    assert gate.state == state
    assert rise in gate.says


@pytest.mark.parametrize(("last", "state"), [(-0.01, "passed"), (-0.011, "failed")])
def test_a_loss_may_fall_by_a_hundredth_of_a_nat(last, state):
    teachers = (teacher(0.0, 0.0, last),)
    assert converged(stored(teachers=teachers, lower_is_better=True)).state == state


@pytest.mark.parametrize(
    ("scores", "state", "numbers"),
    [
        # Mean 1; the standard deviation of (0, 1, 2) is 1, two standard errors are 1.155.
        ((70.0, 71.0, 72.0), "failed", "+1.00 points, two standard errors 1.15, 3 seeds"),
        ((70.2, 71.0, 71.8), "passed", "+1.00 points"),
        ((69.0, 69.0, 69.0), "failed", "-1.00 points"),
        ((70.0, 70.0, 70.0), "failed", "+0.00 points"),
    ],
)
def test_plain_distillation_has_to_beat_labels_by_two_standard_errors(scores, state, numbers):
    result = stored(cells("best teacher", scores), cells("labels", (70.0, 70.0, 70.0)))

    gate = distils(result, plain="best teacher", labels="labels")

    assert gate.state == state
    assert numbers in gate.says


@pytest.mark.parametrize("lacking", [{"plain": None}, {"labels": None}, {"labels": "no such arm"}])
def test_a_gate_without_its_arm_is_not_applicable_and_says_so(lacking):
    result = assess(example(), MadeUp(**lacking))
    gate = next(gate for gate in result.groups[0].gates if gate.name == DISTILLS)
    assert gate.state == "not applicable"
    assert "no arm" in gate.says
    assert result.differences


def test_a_group_fails_alone_and_the_others_are_corrected_without_it():
    scores = {
        "method, T 1": (80.0, 81.0, 82.0),
        "best teacher, T 1": (79.0, 79.7, 81.0),
        "method, T 4": (75.0, 76.0, 77.0),
        "best teacher, T 4": (60.0, 61.0, 62.0),
        "labels": (70.0, 71.1, 72.0),
    }
    result = assess(
        stored(*(cells(arm, values) for arm, values in scores.items())), MadeUp(arms=(*scores,))
    )

    assert [(group.name, group.is_compared) for group in result.groups] == [
        ("T 1", True),
        ("T 4", False),
    ]
    assert [(one.arm, one.reference) for one in result.differences] == [
        ("best teacher, T 1", "method, T 1"),
        ("labels", "method, T 1"),
    ]
    assert "`best teacher, T 4` less `labels`" in result.groups[1].gates[1].says
