"""The plan of the evidence: equal costs, copies, and stored cells."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import evidence_plan
import pytest
from evidence_cells import SAME_RUN
from stored_cells import bench_of, one_cell, stored_of

if TYPE_CHECKING:
    from evidence_cells import Stored


def test_a_cell_at_equal_cost_takes_the_steps_that_the_reference_pays_for():
    stored = stored_of(
        one_cell("ours", 100),
        one_cell("twice", 200),
        one_cell("same", 105),
        one_cell("first", 150, fixed=50),
    )

    assert evidence_plan.cost_share(stored, "ours", "ours") is None
    assert evidence_plan.cost_share(stored, "twice", "ours") == 0.5
    assert evidence_plan.cost_share(stored, "same", "ours") == 1.0
    assert evidence_plan.cost_share(stored, "first", "ours") == 0.5


def test_an_arm_that_is_too_dear_before_its_first_step_has_no_cell_at_equal_cost():
    stored = stored_of(one_cell("ours", 100), one_cell("dear", 300, fixed=99))

    assert evidence_plan.cost_share(stored, "dear", "ours") is None
    assert evidence_plan.cost_share(stored, "not yet run", "ours") is None


def test_cost_is_the_median_over_the_seeds_that_both_arms_have():
    stored = stored_of(
        *(one_cell("ours", 100, seed=seed) for seed in (1, 2, 3)),
        *(
            one_cell("other", cost, seed=seed)
            for seed, cost in enumerate((400, 200, 250, 1), start=1)
        ),
        *(one_cell("alike", cost, seed=seed) for seed, cost in enumerate((80, 105, 104), start=1)),
    )

    assert evidence_plan.cost_share(stored, "other", "ours") == 0.4
    assert evidence_plan.cost_share(stored, "alike", "ours") == 1.0


def test_a_lesser_control_has_no_cell_at_equal_cost(tmp_path):
    arms = ("soft", "random soft", "random hard", "only soft_target_kl", "only hidden_mse")
    stored = stored_of(*(one_cell(arm, 100) for arm in arms), comparison="selection")

    _, left = evidence_plan.known_and_left(bench_of(tmp_path), stored, [1], arms, "cost")

    assert [run.name for run in left] == ["random soft", "only soft_target_kl"]


def test_a_stored_cell_is_run_again_only_with_other_steps(tmp_path):
    bench, arms = bench_of(tmp_path), ("uniform, T 1", "takd, T 1", "mean, T 1", "labels")
    ours, takd, mean = (
        dataclasses.replace(one_cell(arm, cost), max_steps=400)
        for arm, cost in zip(arms, (100, 200, 105), strict=False)
    )
    stored = stored_of(ours, takd, mean)

    known, left = evidence_plan.known_and_left(bench, stored, [1], arms, "steps")
    assert ([c.arm for c in known], [run.name for run in left]) == ([*arms[:3]], ["labels"])

    known, left = evidence_plan.known_and_left(bench, stored, [1], arms[:3], "cost")
    assert known == [dataclasses.replace(mean, basis="cost")]
    assert [(run.name, run.steps) for run in left] == [("takd, T 1", 200)]

    paid = dataclasses.replace(takd, basis="cost", max_steps=200)
    known, left = evidence_plan.known_and_left(
        bench, stored_of(ours, takd, paid), [1], arms[:2], "cost"
    )
    assert (known, left) == ([paid], [])


def test_labels_cost_as_much_as_the_reference_of_the_group_that_is_trained(tmp_path):
    stored = stored_of(one_cell("uniform, T 4", 100), one_cell("labels", 200))

    _, left = evidence_plan.known_and_left(bench_of(tmp_path), stored, [1], ["labels"], "cost")

    assert [(run.name, run.steps) for run in left] == [("labels", 200)]


def trial(chosen: float, **scores: float) -> Stored:
    """A cell of MiniDisc at 0.9 whose first trial has these scores."""
    details = {f"trial score {name[1:]}": score for name, score in scores.items()}
    made = dataclasses.replace(
        one_cell("minidisc, 0.9", 100), details={**details, "chosen": chosen}
    )
    return stored_of(made, comparison="minidisc")


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

    copy = evidence_plan.copied(stored, arm, 1, basis)

    assert (copy is not None) == is_same
    if copy is not None:
        assert (copy.arm, copy.basis, copy.score) == (arm, basis, 50.0)
        assert copy.details[SAME_RUN]


def test_a_target_that_is_barred_is_no_copy_of_a_run_that_it_has_won():
    stored = trial(chosen=0.9, **{**SCORES, "s0.9": 0.89})

    assert evidence_plan.copied(stored, "target barred, 0.9", 1, "steps") is None
    assert evidence_plan.copied(stored, "lambda 0.4, 0.9", 1, "steps") is not None
