"""Checks of the chosen runs, data and disk before the first cell of the evidence is trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evidence_arms import group_of
from evidence_comparisons import COMPARISONS
from evidence_settings import Setting

if TYPE_CHECKING:
    from pathlib import Path

Chosen = tuple[str, Setting, Sequence[int]]
"""A comparison, a setting and the seeds."""
GIGABYTE = 10**9
TEACHER_SPACE, CELL_SPACE = 0.1 * GIGABYTE, 1.0 * GIGABYTE
"""Of a finished teacher with its answers, and of a running cell with its checkpoints."""


class UnusableError(Exception):
    """The benchmark cannot run here."""


def check_chosen(
    places: Sequence[Chosen], comparisons: Sequence[str], settings: Sequence[str]
) -> None:
    """Raise UnusableError if no comparison is made in one of the settings."""
    if not places:
        known = {name: ", ".join(COMPARISONS[name].seeds) for name in comparisons}
        words = "; ".join(f"{name} is compared in {found}" for name, found in known.items())
        raise UnusableError(f"nothing to run in {', '.join(settings)}: {words}")


def check_groups(groups: Sequence[str] | None, places: Sequence[Chosen]) -> None:
    """Raise UnusableError if a comparison has no arm of the groups in a setting."""
    for name, setting, _ in places:
        known = {group_of(arm) for arm in COMPARISONS[name].arms_in(setting.name)}
        if groups is not None and not known & {*groups}:
            raise UnusableError(
                f"{name} has no arms of the groups {', '.join(groups)} in the setting "
                f"{setting.name}; its groups are {', '.join(sorted(known - {''}))}"
            )


def check_data(data: Path, settings: Sequence[Setting]) -> None:
    """Raise UnusableError unless the data folder has all files of the settings."""
    for setting in settings:
        for file in setting.needs:
            if not (data / file).is_file():
                raise UnusableError(
                    f"the setting {setting.name} needs {file}, which is not in {data}; name the "
                    "folder with --data, or leave the setting out with --settings"
                )


def check_space(out: Path, places: Sequence[Chosen], jobs: int) -> None:
    """Raise UnusableError unless the disk has room for teachers, caches and running cells."""
    teachers = {
        (setting.name, teacher, seed)
        for name, setting, seeds in places
        for teacher in COMPARISONS[name].teachers
        for seed in seeds
    }
    needed = len(teachers) * TEACHER_SPACE + jobs * CELL_SPACE
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UnusableError(
            f"{out} has {free / GIGABYTE:.1f} GB free; {len(teachers)} teachers with their caches "
            f"and {jobs} running cells need {needed / GIGABYTE:.1f} GB; name another folder with "
            "--out, or choose fewer comparisons with --only"
        )
