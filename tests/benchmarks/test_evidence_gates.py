"""The gates of the evidence: where a setting cannot tell, nothing is compared, and it says why."""

from __future__ import annotations

import dataclasses

import pytest
from stored_cells import RISING, MadeUp, cells, example, stored

from evidence.cells import TeacherGate
from evidence.statistics import CONVERGED, DISTILLS, assess, converged, distils, rise_of

COMPARISON = MadeUp()


def teacher(*scores, name="six", seed=1):
    return TeacherGate(teacher=name, seed=seed, scores=scores, final=0.0)


def test_a_teacher_that_still_rises_hides_the_verdicts_and_is_named_with_its_rise():
    result = assess(example(curve=RISING), COMPARISON)

    (group,) = result.groups
    gate = next(gate for gate in group.gates if gate.state == "failed")
    assert not group.is_compared
    assert result.differences == ()
    assert gate.name == CONVERGED
    assert "six, seed 1: +2.00" in gate.says


@pytest.mark.parametrize(
    ("scores", "rise"),
    [
        ((1, 2, 3), 1),
        ((3, 2, 1), 0),
        # Of four evaluations, the last third, rounded up, is two.
        ((1, 2, 5, 3), 0),
        ((1, 9, 5, 3, 7, 8), 1),
        ((1, 2, 5, 3, 7, 6, 8), 1),
        ((1, 2), float("inf")),
    ],
)
def test_the_rise_is_that_within_the_last_third(scores, rise):
    assert rise_of(teacher(*scores), is_loss=False) == rise
    losses = teacher(*(-score for score in scores))
    assert rise_of(losses, is_loss=True) == rise


def test_half_a_point_is_allowed_and_a_hundredth_of_a_nat():
    def state(rise, **changes):
        sign = -1 if changes else 1
        curve = teacher(0.0, 0.0, sign * rise)
        return converged(stored(teachers=(curve,), **changes)).state

    assert [state(0.5), state(0.51)] == ["passed", "failed"]
    assert [state(0.01, lower_is_better=True), state(0.011, lower_is_better=True)] == [
        "passed",
        "failed",
    ]


def test_too_few_evaluations_fail_and_none_at_all_is_not_applicable():
    assert converged(stored(teachers=(teacher(80.0, 80.0),))).state == "failed"
    assert converged(stored(teachers=(teacher(),))).state == "not applicable"
    assert converged(stored(curve=None)).state == "not applicable"


def test_plain_distillation_has_to_beat_labels_by_two_standard_errors():
    # Mean 1; the standard deviation of (0, 1, 2) is 1, two standard errors are 1.155.
    labels = cells("labels", (70.0, 70.0, 70.0))
    wide = stored(cells("best teacher", (70.0, 71.0, 72.0)), labels)
    narrow = stored(cells("best teacher", (70.2, 71.0, 71.8)), labels)
    worse = stored(cells("best teacher", (69.0, 69.0, 69.0)), labels)
    equal = stored(cells("best teacher", (70.0, 70.0, 70.0)), labels)

    states = {}
    for name, one in {"wide": wide, "narrow": narrow, "worse": worse, "equal": equal}.items():
        states[name] = distils(one, plain="best teacher", labels="labels")
    assert {name: gate.state for name, gate in states.items()} == {
        "wide": "failed",
        "narrow": "passed",
        "worse": "failed",
        "equal": "failed",
    }
    assert "+1.00 points, two standard errors 1.15, 3 seeds" in states["wide"].says


@pytest.mark.parametrize("lacking", [{"plain": None}, {"labels": None}, {"labels": "no such arm"}])
def test_a_gate_without_its_arm_is_not_applicable_and_says_so(lacking):
    result = assess(example(), dataclasses.replace(COMPARISON, **lacking))
    gate = next(gate for gate in result.groups[0].gates if gate.name == DISTILLS)
    assert gate.state == "not applicable"
    assert "no arm" in gate.says
    assert result.differences


def test_a_group_fails_alone_and_the_others_are_corrected_without_it():
    arms = ("method, T 1", "best teacher, T 1", "method, T 4", "best teacher, T 4", "labels")
    scores = {
        "method, T 1": (80.0, 81.0, 82.0),
        "best teacher, T 1": (79.0, 79.7, 81.0),
        "method, T 4": (75.0, 76.0, 77.0),
        "best teacher, T 4": (60.0, 61.0, 62.0),
        "labels": (70.0, 71.1, 72.0),
    }
    result = assess(
        stored(*(cells(arm, values) for arm, values in scores.items())), MadeUp(arms=arms)
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
