"""One row per case and implementation, as it is written to the file of JSON lines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

from bench.cases import Case, bytes_moved, floating_point_operations
from bench.machine import Ceilings, Machine
from bench.memory import Peak
from bench.timing import Times

CEILING = "ceiling"
MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Measurements; None if a number does not exist. README.md explains each.

    Times in milliseconds, clock in MHz, peak_mb in 10^6 bytes, gbps in 10^9 bytes per second.
    """

    case: str
    impl: str
    status: str
    reason: str = ""
    dtype: str
    N: int
    V: int
    Hs: int
    Ht: int
    divergence: str
    temperature: float
    mode: str
    ms_median: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    noise: float | None = None
    tflops_model: float | None = None
    frac_of_floor: float | None = None
    gbps: float | None = None
    peak_mb: float | None = None
    peak_method: str = ""
    loss_relerr: float | None = None
    dx_relerr: float | None = None
    dw_relerr: float | None = None
    clock: float | None = None
    device: str
    threads: int
    torch: str
    triton: str
    commit: str


class Ledger:
    """Keeps the rows and appends each to the file as soon as it is known."""

    def __init__(self, file: TextIO, machine: Machine, ceilings: Ceilings) -> None:
        self.rows: list[Result] = []
        self.machine = machine
        self.ceilings = ceilings
        self._file = file

    def add_ceilings(self, dtype: str, rates: Ceilings) -> None:
        """The two rates of the machine as rows of a case "ceiling"."""
        case = Case(name=CEILING, kind="gemms", n=0, v=0, hs=0, ht=0, dtype=dtype, mixture=())
        for name, times, rate in (
            ("matmul", rates.matmul_times, {"tflops_model": rates.matmul / 1e12}),
            ("copy", rates.copy_times, {"gbps": rates.copy / 1e9}),
        ):
            self._append(replace(self._row(case, name, MEASURED), **rate, **_times(times)))

    def add_missing(self, case: Case, implementation: str, status: str, reason: str) -> None:
        """A row without numbers."""
        self._append(replace(self._row(case, implementation, status), reason=reason))

    def add(
        self, case: Case, implementation: str, times: Times, *, peak: Peak, **others: float | None
    ) -> None:
        """A row with its numbers; `others` are columns."""
        row = replace(
            self._row(case, implementation, MEASURED),
            peak_mb=peak.bytes_ / 1e6, peak_method=peak.method, **others,
            **_times(times), **self._shares(case, times.median / 1e3),
        )  # fmt: skip
        self._append(row)

    def _shares(self, case: Case, seconds: float) -> dict[str, float | None]:
        """Rates, and the least time at the machine's own rates over the time taken."""
        flops, moved = floating_point_operations(case), bytes_moved(case)
        floor = max(flops / self.ceilings.matmul, moved / self.ceilings.copy)
        return {
            "tflops_model": flops / seconds / 1e12 if flops else None,
            "gbps": moved / seconds / 1e9 if moved else None,
            "frac_of_floor": floor / seconds,
        }

    def _row(self, case: Case, implementation: str, status: str) -> Result:
        return Result(
            case=case.name, impl=implementation, status=status, dtype=case.dtype,
            N=case.n, V=case.v, Hs=case.hs, Ht=case.ht, divergence=case.divergence,
            temperature=case.temperature, mode=case.mode, **self.machine._asdict(),
        )  # fmt: skip

    def _append(self, row: Result) -> None:
        self.rows.append(row)
        self._file.write(json.dumps(asdict(row)) + "\n")
        self._file.flush()


def read(path: Path) -> list[Result]:
    """The rows of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Result(**json.loads(line)) for line in lines]


def _times(times: Times) -> dict[str, float]:
    columns = ("ms_median", "ms_p20", "ms_p80", "noise")
    return dict(zip(columns, times, strict=True))
