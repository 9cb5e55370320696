"""Statistics of the evidence: paired differences, their tests, and the pairs that a test needs.

Every arm is compared with its reference arm, seed by seed. The noise of a score is estimated from
the compared arms of a setting together, as in a randomised block design whose blocks are the seeds
(Montgomery, Design and Analysis of Experiments, chapter 4): three seeds of one arm alone say little
about it. Arms that are noisier than the others (Cochran's C test, as in ISO 5725-2) have no part in
this estimate, and an estimate of their own. The p-values of a family of tests are corrected
together after Holm (A simple sequentially rejective multiple test procedure, Scandinavian Journal
of Statistics 6, 1979), so that the best of many arms is not a lucky arm. Beside it stands the
paired t-test of each comparison, which shares no noise with other arms and is not corrected.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import f as fisher_f
from scipy.stats import norm, ttest_1samp
from scipy.stats import t as student_t
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from evidence.cells import BASES, SAME_RUN, Basis, Stored, TeacherGate, paired
from evidence.comparisons import Comparison, arm_beside, group_of
from lib.tables import mean_and_deviation

Verdict = Literal["better", "worse", "perhaps better", "perhaps worse", "cannot be told"]
LEVEL, POWER = 0.05, 0.8
SAME = 1e-9
"""Differences whose deviation is below this are the same number."""


class Unit(NamedTuple):
    """A unit of scores, the smallest difference that matters, and the decimals that are shown."""

    name: str
    smallest: float
    decimals: int


POINTS, NATS = Unit("points", 0.5, 2), Unit("nats", 0.01, 4)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An arm's score minus that of its reference arm, over the seeds that both have.

    A positive mean says that the arm is better, also where a smaller score is better.

    pairs: number of seeds, at least 1. deviation: of a paired difference, from the noise of the
        compared arms, or from these pairs if arm or reference is noisier. low, high, p: Student's
        95 % interval and two-sided p-value; NaN where the noise cannot be estimated. adjusted: the
        p-value after Holm in its family.
    paired_t, paired_p: of the paired t-test of these pairs alone; NaN for one pair or no spread.
    pairs_needed: pairs at which a test sees the unit's smallest difference; None: not known.
    """

    arm: str
    reference: str
    basis: Basis
    pairs: int
    mean: float
    deviation: float
    low: float
    high: float
    p: float
    adjusted: float
    paired_t: float
    paired_p: float
    pairs_needed: int | None

    @property
    def verdict(self) -> Verdict:
        """The result of the test after Holm's correction, else `perhaps` that of the pairs."""
        if self.adjusted < LEVEL:
            return "better" if self.mean > 0 else "worse"
        if self.paired_p < LEVEL:
            return "perhaps better" if self.mean > 0 else "perhaps worse"
        return "cannot be told"


def unit_of(stored: Stored) -> Unit:
    """Return the unit of the scores: nats where a smaller score is better, else points."""
    return NATS if stored.lower_is_better else POINTS


def differences(
    stored: Stored, references: Iterable[tuple[str, str]], *, first: Container[str] = ()
) -> tuple[Difference, ...]:
    pairs = [(arm, reference) for arm, reference in references if arm != reference]
    scores = _scores(stored, pairs)
    alike = alike_noisy(scores)
    noise, noisier = noise_of(alike), {run for run, _ in scores.keys() - alike.keys()}

    def compared(arm: str, reference: str, basis: Basis, values: Sequence[float]) -> Difference:
        is_noisier = {_run_of(stored, arm, basis), (reference, BASES[0])} & noisier
        its_noise = own_noise(values) if is_noisier else noise
        one = _difference(values, arm=arm, reference=reference, basis=basis, noise=its_noise)
        needed = pairs_needed(one.deviation, unit_of(stored).smallest)
        return dataclasses.replace(one, pairs_needed=needed)

    made = [
        compared(arm, reference, basis, values)
        for arm, reference in pairs
        for basis in BASES
        if (values := paired(stored, arm, reference, basis=basis))
    ]
    # Runs that serve both bases are one test, and count once.
    tests = {_run_of(stored, one.arm, one.basis): one.p for one in made}
    adjusted = dict[tuple[str, Basis], float]()
    for is_first in (True, False):
        family = {test: p for test, p in tests.items() if (test[0] in first) is is_first}
        adjusted |= zip(family, holm([*family.values()]), strict=True)
    return tuple(
        dataclasses.replace(one, adjusted=adjusted[_run_of(stored, one.arm, one.basis)])
        for one in made
    )


class Noise(NamedTuple):
    """Deviation of a score beyond the effects of its arm and its seed, with degrees of freedom."""

    deviation: float
    freedom: int


Scores = Mapping[tuple[Hashable, int], float]
"""By arm and seed."""


def noise_of(scores: Scores) -> Noise:
    """Return the residual deviation of scores after the effects of arms and seeds.

    With two arms this is the deviation of the paired differences divided by the root of 2.
    """
    residuals, freedom = _residuals(scores)
    if freedom == 0:
        return Noise(math.nan, 0)
    return Noise(float(np.linalg.norm([*residuals.values()])) / math.sqrt(freedom), freedom)


def own_noise(values: Sequence[float]) -> Noise:
    """Return the noise of paired differences from these alone, as in the paired t-test."""
    if len(values) == 1:
        return Noise(math.nan, 0)
    return Noise(statistics.stdev(values) / math.sqrt(2), len(values) - 1)


def paired_test(values: Sequence[float]) -> tuple[float, float]:
    """Return t and the two-sided p-value of paired differences; NaN for one pair or no spread."""
    if len(values) == 1 or statistics.stdev(values) < SAME:
        return math.nan, math.nan
    tested = ttest_1samp(values, 0.0)
    return float(tested.statistic), float(tested.pvalue)


def alike_noisy(scores: Scores) -> Scores:
    """Return the scores without those of arms that are noisier than the others.

    The arm with the largest sum of squared residuals is left out as long as its share of the sum
    over all arms is above the limit of Cochran's test. Two arms have the same residuals.
    """
    squares = defaultdict[Hashable, list[float]](list)
    for (arm, _), residual in _residuals(scores)[0].items():
        squares[arm].append(residual**2)
    sums = {arm: sum(values) for arm, values in squares.items()}
    total = sum(sums.values())
    if len(sums) < 3 or total < SAME:
        return scores
    noisiest = max(sums, key=sums.__getitem__)
    if sums[noisiest] / total <= cochran_limit(len(sums), len(squares[noisiest])):
        return scores
    return alike_noisy({key: score for key, score in scores.items() if key[0] != noisiest})


def cochran_limit(arms: int, seeds: int) -> float:
    """Return the largest share of one arm that Cochran's C test allows at 1 % (ISO 5725-2, 7.3.3).

    The limit is F / (F + arms - 1), where F is the quantile 1 - 0.01 / arms of the F distribution
    with seeds - 1 and (arms - 1)(seeds - 1) degrees of freedom.
    """
    freedom = max(1, seeds - 1)
    quantile = float(fisher_f.isf(0.01 / arms, freedom, (arms - 1) * freedom))
    return quantile / (quantile + arms - 1)


def _residuals(scores: Scores) -> tuple[dict[tuple[Hashable, int], float], int]:
    """Return what remains after the effects of arms and seeds, with its degrees of freedom."""
    labels = [dict.fromkeys(names) for names in zip(*sorted(scores, key=repr), strict=True)]
    effects = np.array(
        [[x == key[place] for place in range(len(key)) for x in labels[place]] for key in scores],
        dtype=float,
    ).reshape(len(scores), sum(map(len, labels)))
    values = np.array([*scores.values()])
    fitted, _, rank, _ = np.linalg.lstsq(effects, values)
    residuals = (values - effects @ fitted).tolist()
    return dict(zip(scores, residuals, strict=True)), len(values) - int(rank)


def _scores(
    stored: Stored, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[tuple[str, Basis], int], float]:
    """Return the scores of all compared arms and their references, each run once.

    A copied cell is no run of its own, and would make the noise seem smaller.
    """
    compared = dict.fromkeys((arm, basis) for arm, _ in pairs for basis in BASES)
    compared |= dict.fromkeys((reference, BASES[0]) for _, reference in pairs)
    is_again = {arm for arm, _ in pairs if has_same_runs(stored, arm)}
    return {
        ((arm, basis), seed): cell.score
        for arm, basis in sorted(compared)
        if basis == BASES[0] or arm not in is_again
        for seed, cell in sorted(stored.of(arm, basis).items())
        if SAME_RUN not in cell.details
    }


def _run_of(stored: Stored, arm: str, basis: Basis) -> tuple[str, Basis]:
    return arm, BASES[0] if has_same_runs(stored, arm) else basis


def has_same_runs(stored: Stored, arm: str) -> bool:
    """Return whether the cells of an arm at equal cost are its cells at equal steps."""
    cells = stored.of(arm, "cost").items()
    return {s: dataclasses.replace(c, basis="steps") for s, c in cells} == stored.of(arm)


def _difference(
    values: Sequence[float], *, arm: str, reference: str, basis: Basis, noise: Noise
) -> Difference:
    mean, deviation = statistics.fmean(values), math.sqrt(2) * noise.deviation
    # Equal differences other than zero give no estimate of the spread; a t-test would be certain.
    if deviation < SAME < abs(mean):
        deviation = math.nan
    error = deviation / math.sqrt(len(values))
    reach = float(student_t.isf(LEVEL / 2, noise.freedom)) * error
    paired_t, paired_p = paired_test(values)
    return Difference(
        arm=arm,
        reference=reference,
        basis=basis,
        pairs=len(values),
        mean=mean,
        deviation=deviation,
        low=mean - reach,
        high=mean + reach,
        p=1.0 if error < SAME else 2 * float(student_t.sf(abs(mean) / error, noise.freedom)),
        adjusted=math.nan,
        paired_t=paired_t,
        paired_p=paired_p,
        pairs_needed=None,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values after Holm's correction, in the given order; NaN is no test."""
    tested = [place for place, p in enumerate(p_values) if not math.isnan(p)]
    adjusted = [math.nan] * len(p_values)
    if tested:
        corrected = multipletests([p_values[place] for place in tested], method="holm")[1]
        for place, p in zip(tested, corrected.tolist(), strict=True):
            adjusted[place] = p
    return adjusted


@functools.cache  # compared arms have their noise in common
def pairs_needed(deviation: float, difference: float) -> int | None:
    """Return the pairs at which a two-sided test at 5 % sees a difference with 80 % power."""
    if math.isnan(deviation):
        return None
    effect, power = difference / max(deviation, SAME), TTestPower().power
    # The normal approximation is never above the exact number, and close.
    normal = ((norm.ppf(1 - LEVEL / 2) + norm.ppf(POWER)) / effect) ** 2
    pairs = max(2, math.ceil(normal))
    # NaN ends the search: so far beyond the limit, the power is 1.
    while power(effect, pairs, LEVEL) < POWER:
        pairs += 1
    return pairs


State = Literal["passed", "failed", "not applicable"]
CONVERGED = "Teachers have converged"
DISTILLS = "Plain distillation beats labels"


class Gate(NamedTuple):
    """The outcome of a gate with its numbers."""

    name: str
    state: State
    says: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The arms with one reference arm; plain and labels are None where no such arm exists."""

    reference: str
    arms: tuple[str, ...]
    plain: str | None
    labels: str | None
    gates: tuple[Gate, ...]

    @property
    def is_compared(self) -> bool:
        return all(gate.state != "failed" for gate in self.gates)

    @property
    def name(self) -> str:
        """The name of the group; empty if the comparison has one group without a name."""
        return group_of(self.reference)


@dataclass(frozen=True, kw_only=True)
class Assessed:
    """A comparison in a setting: its groups with their gates, and the differences of arms.

    differences: of the arms of all groups that are compared. Plain distillation of all groups is
        one family of tests, all other arms are the other family.
    """

    stored: Stored
    groups: tuple[Group, ...]
    differences: tuple[Difference, ...]


def assess(stored: Stored, comparison: Comparison) -> Assessed:
    assessed = groups(stored, comparison)
    compared = [
        (arm, group.reference) for group in assessed if group.is_compared for arm in group.arms
    ]
    plain = {group.plain for group in assessed if group.plain is not None}
    return Assessed(
        stored=stored, groups=assessed, differences=differences(stored, compared, first=plain)
    )


def groups(stored: Stored, comparison: Comparison) -> tuple[Group, ...]:
    """Return the groups of the arms that have cells, in the order of the comparison's arms."""
    order = {arm: place for place, arm in enumerate(comparison.arms)}
    present = {*stored.arms("steps"), *stored.arms("cost")}
    arms = sorted(present, key=lambda arm: (order.get(arm, len(order)), arm))
    by_reference = defaultdict[str, list[str]](list)
    for arm in arms:
        by_reference[comparison.reference_of(arm, present)].append(arm)
    made = []
    for reference, its in by_reference.items():
        plain, labels = (
            None if name is None else arm_beside(comparison.arms, name, reference)
            for name in (comparison.plain, comparison.labels)
        )
        gates = (converged(stored), distils(stored, plain=plain, labels=labels))
        made.append(
            Group(reference=reference, arms=tuple(its), plain=plain, labels=labels, gates=gates)
        )
    return tuple(made)


def converged(stored: Stored) -> Gate:
    """Return whether the validation scores of every teacher and seed no longer rise.

    A teacher has converged if its score rises by at most 0.5 points (0.01 nats) within the last
    third of its evaluations, rounded up. Teachers without evaluations were not trained here, and
    are left out.
    """
    unit = unit_of(stored)
    trained = [teacher for teacher in stored.teachers if teacher.scores]
    if not trained:
        return Gate(CONVERGED, "not applicable", "no evaluation of a teacher is stored")
    rises = [(rise_of(one, is_loss=stored.lower_is_better), one) for one in trained]
    bad = [(rise, one) for rise, one in rises if not rise <= unit.smallest]
    shown = bad or [max(rises, key=lambda pair: pair[0])]
    words = "; ".join(
        f"{one.teacher}, seed {one.seed}: {rise:+.{unit.decimals}f}"
        if math.isfinite(rise)
        else f"{one.teacher}, seed {one.seed}: {len(one.scores)} evaluations"
        for rise, one in shown
    )
    limit = f"at most {unit.smallest:g} {unit.name} are allowed"
    if bad:
        says = f"{len(bad)} of {len(trained)} still rise ({words}; {limit})"
        return Gate(CONVERGED, "failed", says)
    return Gate(CONVERGED, "passed", f"largest rise of {len(trained)}: {words} ({limit})")


def rise_of(teacher: TeacherGate, *, is_loss: bool) -> float:
    """Return how much the best score of the last third of evaluations is above its first score.

    The last third has at least two evaluations. Fewer than three evaluations say nothing: the rise
    is infinite.
    """
    if len(teacher.scores) < 3:
        return math.inf
    scores = [-score if is_loss else score for score in teacher.scores]
    last = scores[-max(2, math.ceil(len(scores) / 3)) :]
    return max(last) - last[0]


def distils(stored: Stored, *, plain: str | None, labels: str | None) -> Gate:
    """Return whether plain distillation beats labels alone by two standard errors of the pairs."""
    if plain is None or labels is None:
        lacking = "plain distillation" if plain is None else "labels alone"
        return Gate(DISTILLS, "not applicable", f"the comparison has no arm with {lacking}")
    unit = unit_of(stored)
    values = paired(stored, plain, labels, basis="steps")
    if len(values) < 2:
        says = f"`{plain}` and `{labels}` have seeds in common: {len(values)}, two are needed"
        return Gate(DISTILLS, "failed", says)
    mean, deviation = mean_and_deviation(values)
    margin = 2 * deviation / math.sqrt(len(values))
    says = (
        f"`{plain}` less `{labels}`: {mean:+.{unit.decimals}f} {unit.name}, "
        f"two standard errors {margin:.{unit.decimals}f}, {len(values)} seeds"
    )
    return Gate(DISTILLS, "passed" if mean > 0 and mean >= margin else "failed", says)
