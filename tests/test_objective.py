"""Which terms fit which models, and what a step is divided by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megakd.errors import ConfigError, TeacherError
from megakd.losses import Reading
from megakd.objective import (
    Shape,
    build_objective,
    check_terms,
    count_units,
    layer_pairs,
    objective_needs,
    unit_weights,
)
from megakd.stage import IGNORE, Batch, Knowledge
from megakd.terms import (
    HardCrossEntropy,
    HardMse,
    HiddenCosine,
    HiddenMse,
    SoftTargetJsd,
    SoftTargetKl,
    SoftTargetMse,
    SoftTargetReverseKl,
)

CE = HardCrossEntropy(loss="hard_cross_entropy")
KL = SoftTargetKl(loss="soft_target_kl")
REVERSE = SoftTargetReverseKl(loss="soft_target_reverse_kl")
JSD = SoftTargetJsd(loss="soft_target_jsd")
HARD_MSE = HardMse(loss="hard_mse")
SOFT_MSE = SoftTargetMse(loss="soft_target_mse")
HIDDEN_MSE = HiddenMse(loss="hidden_mse")
HIDDEN_COSINE = HiddenCosine(loss="hidden_cosine")
STUDENT, TEACHER = Shape(2, 4, 3), Shape(12, 6, 3)
COMPARING = (KL, REVERSE, JSD, SOFT_MSE, HIDDEN_MSE, HIDDEN_COSINE)


def named(case: Any) -> str:
    return case if isinstance(case, str) else case.loss


def mapped(mapping: Any, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    term = HiddenMse(loss="hidden_mse", layer_mapping=mapping)
    return layer_pairs(term, Shape(student, 4, 3), Shape(teacher, 4, 3))


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (4, 12, ((1, 3), (2, 6), (3, 9), (4, 12))),
        (3, 3, ((1, 1), (2, 2), (3, 3))),
        (4, 6, ((1, 2), (2, 3), (3, 4), (4, 6))),  # 1.5 and 4.5 round to even
        (1, 6, ((1, 6),)),
    ],
)
def test_uniform_spreads_the_students_layers_over_the_teachers(student, teacher, pairs):
    assert mapped("uniform", student, teacher) == pairs


def test_last_maps_the_last_layer_to_the_last():
    assert mapped("last", 4, 12) == ((4, 12),)


def test_pairs_are_taken_as_written_and_0_is_the_embedding_output():
    assert mapped(("0:0", "2:11"), 2, 12) == ((0, 0), (2, 11))


@pytest.mark.parametrize("pair", ["7:1", "1:13"])
def test_a_pair_beyond_a_model_is_refused_as_written_with_both_layer_counts(pair):
    with pytest.raises(
        TeacherError,
        match=rf"hidden_mse\.layer_mapping {pair}: the student has 2 layers, the teacher 12",
    ):
        mapped(("1:1", pair), 2, 12)


def test_a_pair_beyond_a_model_is_found_before_anything_is_built():
    term = HiddenCosine(loss="hidden_cosine", layer_mapping=("7:1",))

    with pytest.raises(TeacherError, match=r"hidden_cosine\.layer_mapping 7:1"):
        check_terms((CE, term), "classification", STUDENT, TEACHER)


@pytest.mark.parametrize("term", COMPARING, ids=named)
def test_a_term_that_compares_is_refused_without_a_teacher(term):
    task = "regression" if term is SOFT_MSE else "classification"

    with pytest.raises(ConfigError, match=f"{term.loss} compares with a teacher and this stage"):
        build_objective((term,), task, STUDENT, None)


@pytest.mark.parametrize("term", [KL, REVERSE, JSD], ids=named)
def test_classes_that_differ_are_refused_with_both_numbers(term):
    with pytest.raises(TeacherError, match=f"{term.loss}: the teacher has 5 classes, the student"):
        build_objective((term,), "classification", STUDENT, Shape(12, 6, 5))


def test_vocabularies_of_different_padding_are_no_reason_to_refuse_a_language_model():
    padded = Shape(12, 6, 152064)

    assert build_objective((KL,), "causal_lm", Shape(2, 4, 151936), padded).needs_teacher


def test_hard_terms_need_no_teacher():
    objective = build_objective((CE,), "classification", STUDENT, None)

    assert not objective.needs_teacher


@pytest.mark.parametrize(
    ("task", "terms", "units"),
    [
        ("classification", (CE,), {"hard_cross_entropy": "targets"}),
        (
            "classification",
            (KL, REVERSE, JSD),
            dict.fromkeys(
                ("soft_target_kl", "soft_target_reverse_kl", "soft_target_jsd", "top1_agreement"),
                "examples",
            ),
        ),
        ("regression", (HARD_MSE,), {"hard_mse": "targets"}),
        ("regression", (SOFT_MSE,), {"soft_target_mse": "examples"}),
        (
            "causal_lm",
            (CE, KL, JSD),
            dict.fromkeys(
                ("hard_cross_entropy", "soft_target_kl", "soft_target_jsd", "top1_agreement"),
                "targets",
            ),
        ),
        (
            "causal_lm",
            (HIDDEN_MSE, HIDDEN_COSINE),
            {"hidden_mse": "tokens", "hidden_cosine": "tokens"},
        ),
    ],
    ids=["hard", "soft", "score", "soft score", "language model", "hidden"],
)
def test_every_term_is_counted_in_its_unit(task, terms, units):
    assert build_objective(terms, task, STUDENT, TEACHER).units == units


def test_only_hidden_terms_ask_for_hidden_states():
    asks = {
        terms: (
            objective_needs(terms).hidden_states,
            build_objective(terms, "classification", STUDENT, TEACHER).needs.hidden_states,
        )
        for terms in ((CE, KL), (CE, HIDDEN_COSINE))
    }

    assert asks == {(CE, KL): (False, False), (CE, HIDDEN_COSINE): (True, True)}


def test_projections_are_parameters_of_the_objective():
    objective = build_objective(
        (HIDDEN_MSE, HIDDEN_COSINE), "classification", STUDENT, Shape(12, 6, 3)
    )

    shapes = [tuple(p.shape) for p in objective.parameters()]

    assert shapes == [(6, 4)] * 4  # two mapped layers, two terms


def labelled(labels: torch.Tensor, valid: list[list[int]]) -> Batch:
    return Batch({}, labels, torch.tensor(valid).bool())


def test_units_of_classification_count_unlabelled_rows_as_examples_and_dummy_rows_not_at_all():
    batch = labelled(torch.tensor([1, IGNORE, IGNORE]), [[1, 1, 1], [1, 1, 0], [0, 0, 0]])

    assert count_units([batch]).tolist() == [2, 1, 5]


def test_units_of_regression_count_scores_that_are_there():
    batch = labelled(torch.tensor([-100.0, math.nan]), [[1, 1], [1, 0]])

    assert count_units([batch]).tolist() == [2, 1, 3]  # -100 is a score like any other


def test_units_of_a_language_model_count_positions_and_add_up_over_micro_batches():
    first = labelled(torch.tensor([[4, 5, IGNORE]]), [[1, 1, 1]])
    second = labelled(torch.tensor([[7, IGNORE, IGNORE]]), [[1, 1, 0]])

    counts = count_units([first, second])

    assert counts.tolist() == [2, 3, 5]
    assert counts.dtype == torch.int64


def test_a_unit_weighs_the_world_size_over_its_global_count_which_is_at_least_one():
    weights = unit_weights(torch.tensor([4, 0, 32]), 2)

    assert {u: w.item() for u, w in weights.items()} == {
        "examples": 0.5,
        "targets": 2.0,
        "tokens": 0.0625,
    }


def read(objective: Any, batch: Batch, student: torch.Tensor, teacher: torch.Tensor) -> Any:
    return objective(
        Reading(
            Knowledge(logits=student),
            Knowledge(logits=teacher),
            batch,
            objective.weights,
            unit_weights(count_units([batch]), 1),
        )
    )


def test_hard_terms_average_over_labelled_rows_and_soft_terms_over_all():
    batch = labelled(torch.tensor([1, IGNORE]), [[1], [1]])
    log3 = math.log(3)
    student, teacher = torch.tensor([[0.0, log3], [0.0, log3]]), torch.zeros(2, 2)

    hard, soft = (
        read(build_objective((term,), "classification", *[Shape(2, 4, 2)] * 2), batch, *said)
        for term, said in ((CE, (student, teacher)), (KL, (student, teacher)))
    )

    assert hard.total.item() == pytest.approx(math.log(4 / 3))  # one row of one
    assert soft.total.item() == pytest.approx(0.5 * math.log(4 / 3))  # the mean of two equal rows
    assert soft.sums["soft_target_kl"].item() == pytest.approx(math.log(4 / 3))


def test_the_total_is_the_weighted_sum_of_the_terms():
    terms = (
        HardCrossEntropy(loss="hard_cross_entropy", weight=0.25),
        SoftTargetKl(loss="soft_target_kl", weight=3.0),
    )
    objective = build_objective(terms, "classification", STUDENT, TEACHER)
    batch = labelled(torch.tensor([2, IGNORE]), [[1], [1]])
    torch.manual_seed(0)

    total, sums = read(objective, batch, torch.randn(2, 3), torch.randn(2, 3))

    expected = 0.25 * sums["hard_cross_entropy"] / 1 + 3.0 * sums["soft_target_kl"] / 2
    assert total.item() == pytest.approx(expected.item())


def test_agreement_counts_the_rows_on_which_both_choose_the_same_class():
    batch = labelled(torch.tensor([IGNORE] * 3), [[1], [1], [0]])
    objective = build_objective((KL,), "classification", *[Shape(2, 4, 2)] * 2)
    one, other = [9.0, 0.0], [0.0, 1.0]

    found = read(objective, batch, torch.tensor([one, one, one]), torch.tensor([one, other, one]))

    assert found.sums["top1_agreement"].item() == 1  # the third row is no row
