"""The ratios that this repository promises, from the rows of one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bench.cases import ACCEPTANCE, Device
from bench.results import MEASURED, Result


class Verdict(NamedTuple):
    """A promise, its measurement, and whether it holds; None: not measured."""

    promise: str
    value: float | None
    holds: bool | None


@dataclass(frozen=True)
class Target:
    """A promise about one column: of `over` alone, or divided by that of `under`."""

    promise: str
    column: str
    over: str
    under: str | None = None
    case: str = ACCEPTANCE
    at_least: float = 0.0
    at_most: float = math.inf


_TRITON, _CHUNKED, _COMPILE = "megakd-triton", "megakd-chunked", "compile"
_TARGETS: dict[Device, tuple[Target, ...]] = {
    "cpu": (
        Target("time, chunked / eager, at most 0.8", "ms_median", _CHUNKED, "eager", at_most=0.8),
        Target("peak memory, chunked / eager, at most 0.15", "peak_mb", _CHUNKED, "eager",
               at_most=0.15),
    ),
    "cuda": (
        Target("share of the floor 2NV(3Hs + Ht), at least 0.68", "frac_of_floor", _TRITON,
               at_least=0.68),
        Target("row kernel, share of the rate of copies, at least 0.85", "frac_of_floor", _TRITON,
               case="rows", at_least=0.85),
        Target("time, triton / torch.compile, at most 1.15", "ms_median", _TRITON, _COMPILE,
               at_most=1.15),
        Target("peak memory, triton / eager, at most 0.15", "peak_mb", _TRITON, "eager",
               at_most=0.15),
        Target("error of dX, triton / torch.compile, at most 0.1", "dx_relerr", _TRITON, _COMPILE,
               at_most=0.1),
        Target("times as fast as LigerFusedLinearJSD, at least 1.7", "ms_median", "liger-jsd",
               _TRITON, at_least=1.7),
        Target("times as fast as TRL's tiles, at least 1.4", "ms_median", "trl-tiles", _TRITON,
               at_least=1.4),
        Target("relation: times as fast as eager, at least 5", "ms_median", "eager", _TRITON,
               "relation", at_least=5),
        Target("relation: eager's peak memory over ours, at least 20", "peak_mb", "eager", _TRITON,
               "relation", at_least=20),
    ),
}  # fmt: skip


def verdicts(rows: Iterable[Result], device: Device) -> list[Verdict]:
    """Every target of the device, in order."""
    measured = {(row.case, row.impl): row for row in rows if row.status == MEASURED}
    return [_verdict(target, measured) for target in _TARGETS[device]]


def _verdict(target: Target, rows: Mapping[tuple[str, str], Result]) -> Verdict:
    row = rows.get((target.case, target.over))
    value = None if row is None else getattr(row, target.column)
    if value is not None and target.under is not None:
        other = rows.get((target.case, target.under))
        below = None if other is None else getattr(other, target.column)
        value = value / below if below else None
    holds = None if value is None else target.at_least <= value <= target.at_most
    return Verdict(target.promise, value, holds)
