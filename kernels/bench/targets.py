"""The ratios that this repository promises, from the rows of one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bench.cases import ACCEPTANCE, Device
from bench.results import MEASURED, Result

_GIGABYTE = 1e3  # in the megabytes of Result.peak_mb


class Verdict(NamedTuple):
    """A promise, its measurement, and whether it holds; None: not measured."""

    promise: str
    value: float | None
    holds: bool | None


@dataclass(frozen=True)
class Target:
    """A promise about one column: of `over` alone, or divided by that of `under`.

    beside_head_gradient: without the fp32 gradient of the student's head, which no loss can do
        without; in GB.
    """

    promise: str
    column: str
    over: str
    under: str | None = None
    case: str = ACCEPTANCE
    at_least: float = 0.0
    at_most: float = math.inf
    beside_head_gradient: bool = False


_TRITON, _CHUNKED = "megakd-triton", "megakd-chunked"
_TARGETS: dict[Device, tuple[Target, ...]] = {
    "cpu": (
        Target("time, chunked / eager, at most 0.7", "ms_median", _CHUNKED, "eager", at_most=0.7),
        Target("peak memory, chunked / eager, at most 0.2", "peak_mb", _CHUNKED, "eager",
               at_most=0.2),
    ),
    "cuda": (
        Target("share of the floor 2NV(3Hs + Ht), at least 0.75", "frac_of_floor", _TRITON,
               at_least=0.75),
        Target("row kernel, GB/s, at least 3400 (of an H200)", "gbps", _TRITON, case="rows",
               at_least=3400),
        Target("times as fast as LigerFusedLinearJSD, at least 2.5", "ms_median", "liger-jsd",
               _TRITON, at_least=2.5),
        Target("time, triton / torch.compile, at most 1", "ms_median", _TRITON, "compile",
               at_most=1.0),
        Target("GB of extra memory beside the head's fp32 gradient, at most 1.5", "peak_mb",
               _TRITON, at_most=1.5, beside_head_gradient=True),
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
    if value is not None and row is not None and target.beside_head_gradient:
        value = (value - row.V * row.Hs * 4 / 1e6) / _GIGABYTE
    holds = None if value is None else target.at_least <= value <= target.at_most
    return Verdict(target.promise, value, holds)
