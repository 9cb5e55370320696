"""The ratios that this repository promises, from the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from bench.cases import ACCEPTANCE, Device
from bench.results import MEASURED, Result

_GIGABYTE = 1e3  # in the megabytes of Result.peak_mb


class Verdict(NamedTuple):
    """What was promised, what was measured, and whether that holds; None: not measured."""

    promise: str
    value: float | None
    holds: bool | None


@dataclass(frozen=True)
class Target:
    """A promise about numbers of a run: `measure` may use any row; None where one is missing."""

    promise: str
    measure: Callable[[_Rows], float | None]
    holds: Callable[[float], bool]


class _Rows:
    """Numbers of the measured rows by case and implementation."""

    def __init__(self, rows: Iterable[Result]) -> None:
        self._rows = {(row.case, row.impl): row for row in rows if row.status == MEASURED}

    def number(self, case: str, impl: str, column: str) -> float | None:
        row = self._rows.get((case, impl))
        return None if row is None else getattr(row, column)

    def ratio(self, case: str, over: str, under: str, column: str) -> float | None:
        """The number of one implementation over that of another."""
        numerator, denominator = (self.number(case, impl, column) for impl in (over, under))
        if numerator is None or not denominator:
            return None
        return numerator / denominator

    def memory_beside_head_gradient(self) -> float | None:
        """GB beyond the fp32 gradient of the student's head, which no loss can do without."""
        row = self._rows.get((ACCEPTANCE, "megakd-triton"))
        if row is None or row.peak_mb is None:
            return None
        return (row.peak_mb - row.V * row.Hs * 4 / 1e6) / _GIGABYTE


def verdicts(rows: Iterable[Result], device: Device) -> list[Verdict]:
    """Every target of the device, in order."""
    numbers = _Rows(rows)
    return [_verdict(target, numbers) for target in _TARGETS[device]]


def _verdict(target: Target, rows: _Rows) -> Verdict:
    value = target.measure(rows)
    return Verdict(target.promise, value, None if value is None else target.holds(value))


def _at_most(limit: float) -> Callable[[float], bool]:
    return lambda value: value <= limit


def _at_least(limit: float) -> Callable[[float], bool]:
    return lambda value: value >= limit


_TARGETS: dict[Device, tuple[Target, ...]] = {
    "cpu": (
        Target(
            "time, chunked / eager, at most 0.7",
            lambda rows: rows.ratio(ACCEPTANCE, "megakd-chunked", "eager", "ms_median"),
            _at_most(0.7),
        ),
        Target(
            "peak memory, chunked / eager, at most 0.2",
            lambda rows: rows.ratio(ACCEPTANCE, "megakd-chunked", "eager", "peak_mb"),
            _at_most(0.2),
        ),
    ),
    "cuda": (
        Target(
            "share of the floor 2NV(3Hs + Ht), at least 0.75",
            lambda rows: rows.number(ACCEPTANCE, "megakd-triton", "frac_of_floor"),
            _at_least(0.75),
        ),
        Target(
            "row kernel, GB/s, at least 3400 (of an H200)",
            lambda rows: rows.number("rows", "megakd-triton", "gbps"),
            _at_least(3400),
        ),
        Target(
            "times as fast as LigerFusedLinearJSD, at least 2.5",
            lambda rows: rows.ratio(ACCEPTANCE, "liger-jsd", "megakd-triton", "ms_median"),
            _at_least(2.5),
        ),
        Target(
            "time, triton / torch.compile, at most 1",
            lambda rows: rows.ratio(ACCEPTANCE, "megakd-triton", "compile", "ms_median"),
            _at_most(1.0),
        ),
        Target(
            "GB of extra memory beside the head's fp32 gradient, at most 1.5",
            _Rows.memory_beside_head_gradient,
            _at_most(1.5),
        ),
        Target(
            "relation: times as fast as eager, at least 5",
            lambda rows: rows.ratio("relation", "eager", "megakd-triton", "ms_median"),
            _at_least(5),
        ),
        Target(
            "relation: eager's peak memory over ours, at least 20",
            lambda rows: rows.ratio("relation", "eager", "megakd-triton", "peak_mb"),
            _at_least(20),
        ),
    ),
}
