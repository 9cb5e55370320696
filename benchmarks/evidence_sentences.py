"""Sentences of the evidence: what the differences of a comparison say, in words."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from evidence_arms import named
from evidence_cells import BASES, Basis
from evidence_statistics import Difference, Unit, unit_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from evidence_gates import Assessed, Group

METHOD_VERDICTS = {
    "worse": "**helps** in",
    "better": "**does not help** in",
    "cannot be told": "**cannot be told apart** in",
}
"""The verdict about the method, by the verdict about the control."""


NONE = "-"
"""The text of a value that does not exist."""


class Found(NamedTuple):
    """A difference with its setting and its group."""

    setting: str
    group: str
    unit: Unit
    difference: Difference


def conclusion(settings: Sequence[Assessed], reference: str) -> str:
    """Return whether the method helps, against plain distillation and against the other arms.

    Plain distillation is replaced by labels alone in a comparison without plain distillation.

    Args:
        settings: all settings of the comparison.
        reference: the method's arm, without its group.
    """
    groups = [(one, group) for one in settings for group in one.groups if group.is_compared]
    if not groups:
        return "**Not compared**: no setting passes its gates, so nothing is said about the method."
    controls = {arm for _, group in groups if (arm := _control(group))}
    found = [_found(one, group, each) for one, group in groups for each in _of(one, group)]
    sentences = [_headline(found, controls, reference), _others(found, controls, reference)]
    return (
        " ".join(filter(None, sentences)) or "**Cannot be told**: no two arms have a common seed."
    )


def signed(value: float, unit: Unit) -> str:
    """Return a difference with its sign; a dash if there is none."""
    return NONE if math.isnan(value) else f"{value:+.{unit.decimals}f}"


def _control(group: Group) -> str | None:
    return next((arm for arm in (group.plain, group.labels) if arm != group.reference), None)


def _of(one: Assessed, group: Group) -> Iterable[Difference]:
    return (each for each in one.differences if each.reference == group.reference)


def _found(one: Assessed, group: Group, difference: Difference) -> Found:
    return Found(one.stored.setting, group.name, unit_of(one.stored), difference)


def _headline(found: Sequence[Found], controls: Iterable[str], reference: str) -> str:
    """Return the sentence about the method and its control."""
    against = [one for one in found if one.difference.arm in set(controls)]
    names = ", ".join(dict.fromkeys(f"`{named(one.difference.arm)}`" for one in against))
    clauses = [
        f"at equal {basis}, `{reference}` {said}"
        for basis in BASES
        if (said := _verdicts(against, basis))
    ]
    return f"Compared with {names} {'; '.join(clauses)}." if clauses else ""


def _verdicts(found: Sequence[Found], basis: Basis) -> str:
    """Return the method's verdicts with the places, the gains and their intervals."""
    said = []
    for verdict, words in METHOD_VERDICTS.items():
        gains = [
            f"{one.setting}{f', {one.group}' if one.group else ''} ({_gain(one)})"
            for one in found
            if one.difference.basis == basis and one.difference.verdict == verdict
        ]
        said += [f"{words} {', '.join(gains)}"] if gains else []
    return ", ".join(said)


def _gain(one: Found) -> str:
    """Return the method's score less the control's, with the interval."""
    mean, low, high = (
        signed(-value + 0.0, one.unit)
        for value in (one.difference.mean, one.difference.high, one.difference.low)
    )
    between = "one pair or no spread" if low == NONE else f"95 % interval {low} to {high}"
    return f"{mean} {one.unit.name}, {between}"


def _others(found: Sequence[Found], controls: Iterable[str], reference: str) -> str:
    """Return the sentence about the arms that are not the control; each run counts once."""
    others = [one for one in found if one.difference.arm not in set(controls)]
    bases = defaultdict[Found, list[Basis]](list)
    for one in others:
        bases[one._replace(difference=replace(one.difference, basis=BASES[0]))].append(
            one.difference.basis
        )
    better, worse, untold = (
        [one for one in bases if one.difference.verdict == verdict]
        for verdict in ("better", "worse", "cannot be told")
    )
    if not others:
        return ""
    names = "; ".join(
        f"`{one.difference.arm}` in {one.setting} at equal {' and '.join(bases[one])}, "
        f"{signed(one.difference.mean, one.unit)} {one.unit.name}"
        for one in better
    )
    return (
        f"Differences of the other arms: {len(better)} in favour of the other arm"
        f"{f' ({names})' if names else ''}, {len(worse)} in favour of `{reference}`, "
        f"{len(untold)} that cannot be told from zero."
    )
