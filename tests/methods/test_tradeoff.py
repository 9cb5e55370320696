"""The trade-off of score and size, and who wins it."""

from __future__ import annotations

import math

import pytest

from megakd.errors import ConfigError, TrainingError
from megakd.methods.tradeoff import choose, tradeoff

LAMBDA = 0.2
READ = 0.0025  # what the authors' figure can be read to
# Figure of the authors: metric of the assistant by its sparsity, and the trade-off as drawn.
MRPC = {0.3: 0.915, 0.4: 0.913, 0.5: 0.9125, 0.6: 0.899, 0.7: 0.889, 0.8: 0.8705, 0.9: 0.867}
MRPC_DRAWN = {0.3: 0.973, 0.4: 0.993, 0.5: 1.012, 0.6: 1.019, 0.8: 1.030}
QQP = {0.3: 0.8875, 0.4: 0.886, 0.5: 0.8826, 0.6: 0.881, 0.7: 0.877, 0.8: 0.8695, 0.9: 0.8435}
QQP_DRAWN = {0.3: 0.947, 0.4: 0.966, 0.5: 0.982, 0.6: 1.001, 0.7: 1.017, 0.8: 1.029}
GRID = {0.5: 0.90, 0.7: 0.91, 0.9: 0.80, 0.95: 0.70}


def chosen(scores, *, weight=LAMBDA, teacher=0.0, target=0.9):
    return choose(scores, tradeoff=weight, teacher_sparsity=teacher, target=target)


@pytest.mark.parametrize(
    ("metrics", "drawn"), [(MRPC, MRPC_DRAWN), (QQP, QQP_DRAWN)], ids=["MRPC", "QQP"]
)
def test_the_trade_off_is_the_one_that_the_authors_drew(metrics, drawn):
    # MRPC at 0.7 is left out: the formula says 1.029 and the figure 1.037.
    computed = {sparsity: tradeoff(metrics[sparsity], sparsity, LAMBDA) for sparsity in drawn}

    assert computed == pytest.approx(drawn, abs=READ)


def test_the_authors_qqp_assistant_is_chosen():
    assert chosen(QQP)[:3] == (0.8, pytest.approx(1.0295), False)


def test_of_the_authors_mrpc_scores_the_target_wins_and_then_the_two_they_draw_highest():
    # By their code's own rule there is no assistant; in the figure the target takes no part.
    assert chosen(MRPC)[:3] == (0.9, pytest.approx(1.047), True)
    best, second, *_ = sorted(MRPC_DRAWN | {0.7: 1.037}, key=lambda s: -tradeoff(MRPC[s], s, 0.2))
    assert {best, second} == {0.7, 0.8}
    assert tradeoff(MRPC[best], best, LAMBDA) - tradeoff(MRPC[second], second, LAMBDA) < READ


def test_without_a_weight_the_best_metric_wins():
    assert chosen(GRID, weight=0.0)[:3] == (0.7, 0.91, False)


@pytest.mark.parametrize("weight", [1e6, 1e300, math.inf])
def test_with_a_large_weight_the_sparsest_wins(weight):
    assert chosen(GRID, weight=weight, target=0.95).sparsity == 0.95


def test_candidates_that_are_less_sparse_than_their_teacher_take_no_part():
    assert chosen(GRID, weight=0.0, teacher=0.9)[:3] == (0.9, 0.80, True)


def test_a_candidate_as_sparse_as_its_teacher_takes_part():
    assert chosen(GRID, weight=0.0, teacher=0.7).sparsity == 0.7


def test_the_target_is_taken_in_place_of_a_sparser_one_with_its_own_value():
    scores = {0.5: 0.5, 0.9: 0.8, 0.95: 0.99}

    assert chosen(scores) == (0.9, pytest.approx(0.98), True, pytest.approx(1.18))


def test_equal_trade_offs_go_to_the_sparser_candidate():
    assert chosen({0.5: 0.75, 0.25: 0.8125, 0.9: 0.0}, weight=0.25).sparsity == 0.5


def test_the_order_of_the_candidates_does_not_matter():
    assert chosen(dict(reversed(QQP.items()))) == chosen(QQP)


def test_a_correlation_may_be_negative():
    assert chosen({0.5: -0.3, 0.9: -1.0}).sparsity == 0.5


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(TrainingError, match=r"sparsity 0\.7 has no score \(nan\)"):
        chosen(GRID | {0.7: math.nan})


@pytest.mark.parametrize("metric", [38.2, -1.5, math.inf])
def test_a_metric_that_is_no_fraction_is_refused_with_one_that_is(metric):
    with pytest.raises(
        ConfigError, match=r"sparsity 0\.7 scores .*method\.metric, for example to accuracy"
    ):
        chosen(GRID | {0.7: metric})


def test_a_correlation_a_rounding_error_above_one_is_fine():
    assert chosen({0.5: 1.0 + 1e-12, 0.9: 0.0}).sparsity == 0.5


@pytest.mark.parametrize(("teacher", "target"), [(0.0, 0.8), (0.93, 0.9)])
def test_a_target_that_is_no_candidate_is_refused(teacher, target):
    with pytest.raises(ConfigError, match=rf"target_sparsity {target} is not among .*0\.95"):
        chosen(GRID, teacher=teacher, target=target)
