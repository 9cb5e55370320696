"""The table that is printed last, the list of what was skipped, and the targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from bench.cases import ACCEPTANCE
from bench.machine import Ceilings, Machine
from bench.results import MEASURED, Result
from bench.targets import Verdict

_COLUMNS = {
    "noise": ("noise", "{:.1%}"),
    "of floor": ("frac_of_floor", "{:.1%}"),
    "GB/s": ("gbps", "{:.0f}"),
    "peak MB": ("peak_mb", "{:.0f}"),
    "loss err": ("loss_relerr", "{:.0e}"),
    "dX err": ("dx_relerr", "{:.0e}"),
    "dW err": ("dw_relerr", "{:.0e}"),
}
_TITLES = ("case", "impl", "ms", "p20-p80", *_COLUMNS)
_TEXT_COLUMNS = 2
_WORDS = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}


def machine_lines(machine: Machine, ceilings: Ceilings) -> list[str]:
    """The device, its versions, and its ceilings."""
    versions = f"torch {machine.torch}" + (f", triton {machine.triton}" if machine.triton else "")
    commit = f", commit {machine.commit}" if machine.commit else ""
    return [
        f"{machine.device}; {machine.threads} threads; {versions}{commit}",
        ceiling_line(ceilings, "at the beginning"),
    ]


def ceiling_line(ceilings: Ceilings, when: str) -> str:
    """The rates of the machine."""
    return (
        f"ceilings {when}: {ceilings.matmul / 1e12:.4g} TFLOP/s in matrix products, "
        f"{ceilings.copy / 1e9:.4g} GB/s in copies"
    )


def table(rows: Iterable[Result]) -> list[str]:
    """The measured rows."""
    cells = [_cells(row) for row in rows if row.status == MEASURED]
    if not cells:
        return ["nothing was measured"]
    return _aligned([_TITLES, *cells])


def missing_lines(rows: Iterable[Result]) -> list[str]:
    """Return the implementations without numbers, by reason."""
    cases: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.status != MEASURED:
            cases[row.status, row.impl, row.reason].append(row.case)
    return [
        f"{status}: {impl}: {reason} ({', '.join(names)})"
        for (status, impl, reason), names in cases.items()
    ]


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The targets, both sides of each measured in this run."""
    rows = [
        (each.promise, "" if each.value is None else f"{each.value:.3g}", _WORDS[each.holds])
        for each in verdicts
    ]
    return [f'targets (case "{ACCEPTANCE}" where none is named):', *_aligned(rows)]


def _cells(row: Result) -> tuple[str, ...]:
    between = "" if row.ms_p20 is None else f"{row.ms_p20:.4g}-{row.ms_p80:.4g}"
    numbers = ((getattr(row, column), form) for column, form in _COLUMNS.values())
    texts = ("" if value is None else form.format(value) for value, form in numbers)
    return (row.case, row.impl, f"{row.ms_median:.4g}", between, *texts)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < _TEXT_COLUMNS else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
