"""Part of `gpu_day.py`: the tests of the Triton kernels, on the GPU.

The tests with the mark `gpu` come first, because no other machine can run them. A rehearsal runs
one file in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from gpu_day.process import part_parser, say, skip
from lib.launching import ROOT

TESTS = Path("kernels/tests")
SHOWN = 20


def main(arguments: Sequence[str]) -> int:
    given = part_parser(__doc__).parse_args(arguments)
    for module in ("pytest", "triton"):
        if importlib.util.find_spec(module) is None:
            skip(f"{module} is not installed")
    groups = {"only on a GPU": ["-m", "gpu"], "all others": ["-m", "not gpu"]}
    rows: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    code = 0
    for name, chosen in groups.items():
        report = given.folder / f"{name.replace(' ', '-')}.xml"
        code = max(code, run_tests([*chosen, *files(rehearse=given.rehearse)], report))
        counts, failed = read_junit(report)
        rows.append({"tests": name, **counts})
        failures += failed
        say({"tests": rows, "failures": failures[:SHOWN]})
    return code


def files(*, rehearse: bool) -> list[str]:
    """Return the test files, and the number of processes that compile kernels side by side."""
    if rehearse:
        return [str(TESTS / "test_triton_row_hidden.py")]
    chosen = sorted(str(path.relative_to(ROOT)) for path in (ROOT / TESTS).glob("test_triton_*.py"))
    # Compiles without a GPU and takes longer than all others.
    chosen.remove(str(TESTS / "test_triton_compiles.py"))
    processes = str(min(8, os.cpu_count() or 1))
    return [*chosen, *(["-n", processes] if importlib.util.find_spec("xdist") else [])]


def run_tests(words: Sequence[str], report: Path) -> int:
    """Run pytest and return its exit code; no test chosen counts as success."""
    # A new version's warning is no fault of a kernel.
    quiet = ["-q", "-p", "no:cacheprovider", "-W", "default"]
    command = [sys.executable, "-m", "pytest", *quiet, f"--junit-xml={report}", *words]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    return 0 if code == 5 else code


def read_junit(report: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Return the counts of a report, and its failures with the first line of each message."""
    if not report.is_file():
        return {"passed": 0, "failed": 0, "skipped": 0, "seconds": None}, []
    suite = next(ET.parse(report).getroot().iter("testsuite"))  # noqa: S314 - pytest wrote it
    names = ("tests", "failures", "errors", "skipped")
    whole, failures, errors, skipped = (int(suite.get(name, "0")) for name in names)
    counts = {"passed": whole - failures - errors - skipped, "failed": failures + errors}
    failed = []
    for case in suite.iter("testcase"):
        for problem in (*case.iter("failure"), *case.iter("error")):
            message = (problem.get("message") or "").splitlines() or [""]
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            name = name.removeprefix("kernels.tests.")
            failed.append({"test": name, "message": message[0][:200]})
    return {**counts, "skipped": skipped, "seconds": float(suite.get("time", "0"))}, failed
