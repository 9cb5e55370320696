"""What a comparison of the evidence is made of: arms in groups, and the runs that they refer to.

Every arm trains the same student on the same rows with the same optimizer steps. Arms of one group,
such as a temperature, are compared with the reference arm of their group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from evidence_settings import Setting

Config = dict[str, Any]


class Place(NamedTuple):
    """The models and results that the config of an arm refers to.

    models: folders of the teachers of the seed.
    caches: folders with the answers of these teachers.
    details: of a finished cell of the seed, by arm.
    """

    setting: Setting
    models: Mapping[str, str]
    caches: Mapping[str, str]
    details: Callable[[str], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of a comparison.

    config: sections of the run config that replace those of the setting; the keys of `train` that
        are named replace single keys.
    steps: the optimizer steps of the run, as a share of the setting's steps for a student.
    after: arm whose cell of the same seed is read; without its group in `grouped`.
    same_as: whether the run would be that of the cell `after`, from the details of this cell. The
        cell is then copied, because equal runs give equal weights.
    asks_teachers: False for labels alone, also where the student is cut out of a teacher.
    at_equal_cost: whether the arm has cells at equal cost, too.
    """

    config: Callable[[Place], Config]
    steps: float = 1.0
    after: str | None = None
    same_as: Callable[[Mapping[str, float]], bool] | None = None
    asks_teachers: bool = True
    at_equal_cost: bool = True


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method against its controls, as the page shows them.

    reference: arm of the paper's method. plain: plain distillation from the best teacher; labels:
        the student without a teacher; both without their group, None where no such arm exists.
    arms: by name, in the order of the page.
    """

    title: str
    page: str
    reference: str
    plain: str | None
    labels: str | None
    arms: Mapping[str, object]

    def reference_of(self, arm: str, present: Iterable[str]) -> str:
        """Return the reference arm of an arm's group.

        An arm without a group belongs to the first group that has present arms, else to the first.
        """
        known = {*map(group_of, present)}
        arms = sorted(self.arms, key=lambda one: group_of(one) not in known)
        return arm_beside(arms, self.reference, arm) or self.reference


@dataclass(frozen=True, kw_only=True)
class Trained(Comparison):
    """A comparison whose arms are trained by `evidence.py`.

    seeds: by setting. teachers: those that the arms need. start: of the student.
    deciding: arms that are repeated in the settings after the first: the method, its closest
        controls and its best variants; none: all arms.
    cached: whether the teachers' answers are kept on disk.
    """

    plain: str
    labels: str
    start: str
    seeds: Mapping[str, tuple[int, ...]]
    teachers: tuple[str, ...]
    arms: Mapping[str, Arm]
    deciding: tuple[str, ...] = ()
    cached: bool = False

    def arms_in(self, setting: str) -> dict[str, Arm]:
        """Return the arms that are trained in a setting."""
        is_first = setting == next(iter(self.seeds))
        chosen = () if is_first else self.deciding
        return {name: self.arms[name] for name in chosen or self.arms}


GROUP = ", "


def named(arm: str) -> str:
    """Return an arm's name without its group."""
    return arm.partition(GROUP)[0]


def group_of(arm: str) -> str:
    """Return the name of an arm's group; empty without a group."""
    return arm.partition(GROUP)[2]


def arm_beside(arms: Iterable[str], name: str, arm: str) -> str | None:
    """Return the arm with a name in the group of another arm, else the first with the name."""
    found = [one for one in arms if named(one) == name]
    same = (one for one in found if group_of(one) == group_of(arm))
    return next(same, next(iter(found), None))


def in_group(arm: str, group: str) -> str:
    """Return the name of an arm in a group."""
    return f"{arm}{GROUP}{group}"


def grouped(group: str, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """Return the arms with the name of their group."""
    return {
        in_group(name, group): replace(arm, after=in_group(arm.after, group)) if arm.after else arm
        for name, arm in arms.items()
    }
