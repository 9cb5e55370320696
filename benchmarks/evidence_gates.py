"""Gates of the evidence: whether a setting can answer the question of a comparison.

Arms that share a reference arm form a group, such as those of one temperature. A group is compared
only if its teachers have converged and plain distillation from the best teacher beats labels alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from evidence_arms import arm_beside, group_of
from evidence_cells import Stored, TeacherGate, paired
from evidence_statistics import Difference, differences, unit_of
from machine import mean_and_deviation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evidence_arms import Comparison

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
        """True if every gate has passed or does not apply."""
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
    """Return the groups, gates and differences of a comparison in a setting."""
    found = groups(stored, comparison)
    compared = [
        (arm, group.reference) for group in found if group.is_compared for arm in group.arms
    ]
    plain = {group.plain for group in found if group.plain is not None}
    return Assessed(
        stored=stored, groups=found, differences=differences(stored, compared, first=plain)
    )


def groups(stored: Stored, comparison: Comparison) -> tuple[Group, ...]:
    """Return the groups of the arms that have cells, in the order of the comparison's arms."""
    order = {arm: place for place, arm in enumerate(comparison.arms)}
    present = {*stored.arms("steps"), *stored.arms("cost")}
    arms = sorted(present, key=lambda arm: (order.get(arm, len(order)), arm))
    found = defaultdict[str, list[str]](list)
    for arm in arms:
        found[comparison.reference_of(arm, present)].append(arm)
    return tuple(_group(stored, comparison, reference, its) for reference, its in found.items())


def _group(stored: Stored, comparison: Comparison, reference: str, arms: Sequence[str]) -> Group:
    plain, labels = (
        None if name is None else arm_beside(comparison.arms, name, reference)
        for name in (comparison.plain, comparison.labels)
    )
    return Group(
        reference=reference,
        arms=tuple(arms),
        plain=plain,
        labels=labels,
        gates=(converged(stored), distils(stored, plain=plain, labels=labels)),
    )


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
        f"{one.teacher}, seed {one.seed}: "
        + (
            f"{rise:+.{unit.decimals}f}"
            if math.isfinite(rise)
            else f"{len(one.scores)} evaluations"
        )
        for rise, one in shown
    )
    limit = f"at most {unit.smallest:g} {unit.name} are allowed"
    if bad:
        return Gate(
            CONVERGED, "failed", f"{len(bad)} of {len(trained)} still rise ({words}; {limit})"
        )
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
