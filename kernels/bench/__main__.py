"""Command line: which cases and implementations to run, and where the numbers go."""

from __future__ import annotations

import argparse
import difflib
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from bench.cases import Case, Device, cases_for
from bench.catalogue import IMPLEMENTATIONS, Implementation

if TYPE_CHECKING:
    import torch

    from bench.running import Plan

RESULTS = Path(__file__).parent / "results"
_DEVICES: tuple[Device, ...] = ("cuda", "cpu")
_QUICK_S = {"cpu": 240.0, "cuda": 400.0}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage and one line."""
        self.exit(2, f"python -m bench: {message} (options: --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 1 if a loss of this package failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    implementations = _implementations(parser, options.impl)
    if options.list:
        print("\n".join(_listing()))
        return 0
    _check_names(parser, options.case, [case for each in _DEVICES for case in cases_for(each)])
    return _run(parser, options, implementations)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--list", action="store_true", help="the cases and implementations, then nothing else")
    add("--quick", action="store_true", help="a few cases: 5 minutes on a CPU core, 8 on a GPU")
    add("--case", action="append", metavar="NAME", help="only this case, or those like 'v32000-*'")
    add("--impl", action="append", metavar="NAME", help="only this implementation; repeatable")
    add("--device", choices=_DEVICES, help="default: a GPU if there is one")
    add("--threads", type=_count, metavar="N", help="of torch on the CPU; default: torch's own")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: bench/results")
    return parser


def _run(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    implementations: tuple[Implementation, ...],
) -> int:
    import torch  # after the checks, which then answer at once

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    on_device = cases_for("cuda" if device.type == "cuda" else "cpu")
    _check_names(parser, options.case, on_device, where=f" on {device.type}")
    cases = _select(on_device, options.case, quick=options.quick)
    path = options.out / f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{device.type}.jsonl"
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    return _measure(cases, implementations, _plan(device, quick=options.quick), path)


def _measure(
    cases: list[Case], implementations: tuple[Implementation, ...], plan: Plan, path: Path
) -> int:
    from bench import machine, report
    from bench.results import Ledger
    from bench.running import run_cases
    from bench.targets import verdicts

    described = machine.describe(plan.device)
    ceilings = machine.measure_ceilings(plan.device, plan.effort)
    about = report.machine_lines(described, ceilings)
    print("\n".join(about), flush=True)
    with path.open("w", encoding="utf-8") as file:
        ledger = Ledger(file, described, ceilings)
        ledger.add_ceilings(cases[0].dtype, ceilings)
        run_cases(cases, implementations, plan, ledger, announce=_announce)
        # A card that has become warm may be slower than the one whose rates the shares are of.
        last = machine.measure_ceilings(plan.device, plan.effort)
        ledger.add_ceilings(cases[0].dtype, last)
    about.append(report.ceiling_line(last, "at the end"))
    print(f"\nrows: {path}")
    judged = report.verdict_lines(verdicts(ledger.rows, plan.kind))
    for lines in (report.missing_lines(ledger.rows), about, report.table(ledger.rows), judged):
        print("\n".join(["", *lines]))
    ours = {each.name for each in implementations if each.is_ours}
    return int(any(row.status == "failed" and row.impl in ours for row in ledger.rows))


def _plan(device: torch.device, *, quick: bool) -> Plan:
    from bench.running import Plan
    from bench.timing import Effort

    if device.type == "cuda":
        effort = Effort(0.2, 5) if quick else Effort(0.5, 10)
    else:
        effort = Effort(0.5, 2) if quick else Effort(3.0, 3)
    deadline = time.monotonic() + _QUICK_S[device.type] if quick else None
    return Plan(device=device, effort=effort, deadline=deadline)


def _select(cases: Sequence[Case], patterns: list[str] | None, *, quick: bool) -> list[Case]:
    if patterns is not None:
        return [case for case in cases if any(fnmatchcase(case.name, each) for each in patterns)]
    wanted = {"quick"} if quick else {"quick", "full"}
    return [case for case in cases if case.selection in wanted]


def _check_names(
    parser: argparse.ArgumentParser,
    patterns: list[str] | None,
    cases: Sequence[Case],
    *,
    where: str = "",
) -> None:
    for pattern in patterns or []:
        known = [case.name for case in cases]
        if not any(fnmatchcase(name, pattern) for name in known):
            parser.error(f"there is no case {pattern!r}{where}{_nearest(pattern, known)}")


def _implementations(
    parser: argparse.ArgumentParser, names: list[str] | None
) -> tuple[Implementation, ...]:
    known = [each.name for each in IMPLEMENTATIONS]
    for name in names or []:
        if name not in known:
            parser.error(f"there is no implementation {name!r}{_nearest(name, known)}")
    return tuple(each for each in IMPLEMENTATIONS if names is None or each.name in names)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; the nearest is {near[0]!r}" if near else "; --list shows them"


def _listing() -> list[str]:
    lines = ["implementations:", *(f"  {one.name:<15} {one.about}" for one in IMPLEMENTATIONS)]
    marks = {"quick": "*", "full": " ", "named": "~"}
    for device in _DEVICES:
        lines += [f"cases on {device} (* runs with --quick, ~ only when named):"]
        for case in cases_for(device):
            name = f"{marks[case.selection]} {case.name:<24} {case.kind:<13} {case.mode:<8}"
            shape = f"N={case.n} V={case.v} Hs={case.hs} Ht={case.ht}"
            lines += [f"{name} {shape}  {case.divergence}".rstrip()]
    return lines


def _announce(name: str) -> None:
    print(f"running {name}", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
