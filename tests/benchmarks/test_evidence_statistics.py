"""The statistics of the evidence agree with SciPy, with examples, and with simulated pairs."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from stored_cells import cells, stored

from evidence.statistics import (
    cochran_limit,
    differences,
    holm,
    pairs_needed,
)

SCORES = st.lists(st.tuples(*[st.integers(0, 1000)] * 3), min_size=2, max_size=8)
FIVE = (80.0, 82.0, 81.0, 80.5, 81.7)


def measured(ours, theirs, **changes):
    result = stored(cells("a", ours), cells("b", theirs), **changes)
    return differences(result, [("a", "b"), ("b", "b")])[0]


@pytest.mark.slow
@given(SCORES)
def test_interval_and_p_are_those_of_the_paired_t_test(rows):
    ours, theirs = ([row[place] / 7 for row in rows] for place in (0, 1))
    one = measured(ours, theirs)
    gaps = [mine - other for mine, other in zip(ours, theirs, strict=True)]

    if len({row[0] - row[1] for row in rows}) == 1:
        assert one.verdict == "cannot be told"
        return
    expected = ttest_rel(ours, theirs)
    interval = expected.confidence_interval(0.95)
    assert one.mean == pytest.approx(statistics.fmean(gaps), abs=1e-9)
    assert one.deviation == pytest.approx(statistics.stdev(gaps))
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert one.p == pytest.approx(expected.pvalue)
    assert (one.paired_t, one.paired_p) == pytest.approx((expected.statistic, expected.pvalue))
    assert one.adjusted == one.p


def test_holm_is_right_on_the_textbook_example():
    # Four tests at 5 %: 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 takes the larger p before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


GAINS = (0.2, 1.0, 0.5, 0.9, 0.7)


def noisy(count: int):
    """Return arms whose scores differ from FIVE by noise alone, by name."""
    rng = np.random.default_rng(3)
    return {f"other {n}": [x + e for x, e in zip(FIVE, rng.normal(0, 0.3, 5), strict=True)]
            for n in range(count)}  # fmt: skip


def test_many_arms_take_a_verdict_away_that_one_arm_alone_has():
    arm, others = [x + 0.8 * gain for x, gain in zip(FIVE, GAINS, strict=True)], noisy(40)
    many = stored(cells("a", arm), cells("b", FIVE), *(cells(n, s) for n, s in others.items()))
    references = [("a", "b"), *((name, "b") for name in others)]

    alone = differences(many, references, first={"a"})[0]
    together = differences(many, references)[0]

    assert alone.verdict == "better"
    assert alone.adjusted == alone.p == together.p
    assert together.adjusted == pytest.approx(min(1, 41 * together.p))
    assert together.verdict == "perhaps better"
    assert (together.low, together.high) == (alone.low, alone.high)


@pytest.mark.parametrize(
    ("arms", "seeds", "limit"),
    [(3, 3, 0.942), (5, 3, 0.788), (10, 3, 0.536), (5, 5, 0.633), (20, 3, 0.330)],
)
def test_the_limit_for_noisier_arms_is_that_of_the_published_table(arms, seeds, limit):
    assert cochran_limit(arms, seeds) == pytest.approx(limit, abs=0.0006)


def test_a_noisier_arm_has_its_own_interval_and_does_not_widen_the_others():
    wild, others = (88.0, 70.0, 79.0, 60.0, 95.0), noisy(6)
    pairs = [(name, "b") for name in others]
    calm = [cells("b", FIVE), *(cells(name, scores) for name, scores in others.items())]

    without = differences(stored(*calm), pairs)
    together = differences(stored(cells("wild", wild), *calm), [("wild", "b"), *pairs])

    assert [(o.low, o.high) for o in together[1:]] == [(o.low, o.high) for o in without]
    interval = ttest_rel(wild, FIVE).confidence_interval(0.95)
    assert (together[0].low, together[0].high) == pytest.approx((interval.low, interval.high))


def test_a_difference_that_every_seed_shows_is_perhaps_better_in_the_noise_of_other_arms():
    """As `early` of HomoDistil: three seeds agree, and an arm beside it is noisy."""
    base, gain = (80.0, 82.0, 81.0), (0.50, 0.52, 0.55)
    up = [score + more for score, more in zip(base, gain, strict=True)]
    noisy = cells("noisy", (82.0, 81.0, 83.5))
    pairs = [("up", "b"), ("down", "b"), ("noisy", "b")]
    down = [score - more for score, more in zip(base, gain, strict=True)]

    better, worse, other = differences(
        stored(cells("up", up), cells("down", down), noisy, cells("b", base)), pairs
    )

    assert better.paired_p < 0.01
    assert better.p > 0.1
    verdicts = [one.verdict for one in (better, worse, other)]
    assert verdicts == ["perhaps better", "perhaps worse", "cannot be told"]


@pytest.mark.slow
def test_without_effects_the_tests_are_right_as_often_as_they_say():
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(150):
        seeds = rng.normal(0, 2, size=3)
        arms = {f"{n}": seeds + rng.normal(0, 0.4, size=3) for n in range(8)}
        scores = stored(*(cells(n, list(x)) for n, x in arms.items()))
        result = differences(scores, [(n, "0") for n in arms])
        wrong += any(one.verdict in {"better", "worse"} for one in result)
    assert wrong / 150 < 0.08


def test_both_bases_are_corrected_together_but_the_same_runs_count_once():
    arm, other = (80.4, 82.9, 81.2, 81.4, 82.0), (80.1, 82.9, 81.2, 81.4, 82.0)
    steps, again = cells("a", arm), cells("a", arm, basis="cost")
    changed = cells("a", other, basis="cost")

    once = differences(stored(steps, again, cells("b", FIVE)), [("a", "b")])
    twice = differences(stored(steps, changed, cells("b", FIVE)), [("a", "b")])

    assert [one.adjusted for one in once] == [once[0].p] * 2
    assert [one.basis for one in twice] == ["steps", "cost"]
    assert min(one.adjusted for one in twice) == pytest.approx(2 * min(one.p for one in twice))


def test_a_pair_alone_or_equal_gains_have_no_test():
    single, equal = measured((81.0,), (80.0,)), measured((81.0, 82.0), (80.0, 81.0))

    for one in (single, equal):
        assert one.mean == 1
        assert all(math.isnan(x) for x in (one.low, one.high, one.p, one.deviation, one.adjusted))
        assert math.isnan(one.paired_p)
        assert (one.verdict, one.pairs_needed) == ("cannot be told", None)
    assert measured(FIVE, FIVE).p == 1


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_pairs_needed_are_those_of_published_tables(effect, pairs):
    # Paired t-test, 5 % two-sided, 80 % power; effects in standard deviations.
    assert pairs_needed(1, effect) == pairs
