"""Everything to learn on the first day with a GPU, in one command of at most 30 minutes.

`python benchmarks/gpu_day.py --out runs/gpu-day` on a machine with a GPU, or
`python benchmarks/gpu_day.py --rehearse --out FOLDER` at small sizes on a CPU.

Each part is a process group of its own with a time limit: a part that crashes or hangs costs only
itself. `OUT/results.json` is written after every part, and `OUT/page.md` at the end. The same
command goes on where it was: a finished part is not repeated, all other parts are tried again.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_day.parts import PARTS, Part, grouped
from gpu_day.process import (
    NUMBERS,
    SKIPPED,
    Limited,
    environment,
    last_line,
    numbers_of,
    run_limited,
)
from gpu_day.results import describe, page_of, read_results
from lib.launching import UnusableError
from lib.options import parser_of, words_of
from megakd.process.files import write_json, write_text

FINISHED = "finished"
DONE = (FINISHED, "skipped")
"""States without a problem; a part that was skipped is tried again all the same."""


def main(arguments: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    given = parse(arguments, parts)
    if not given.rehearse and not has_gpu():
        words = "--rehearse runs all parts at small sizes on the CPU"
        print(f"gpu_day: error: torch finds no GPU on this machine; {words}", file=sys.stderr)
        return 1
    try:
        results = read_results(given.out / "results.json", rehearsal=given.rehearse)
    except UnusableError as error:
        print(f"gpu_day: error: {error}", file=sys.stderr)
        return 1
    # A part that hangs is aborted; its tens of gigabytes must not become a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    results["machine"] = describe(rehearsal=given.rehearse)
    for name in given.again:
        results["parts"].pop(name, None)
    wanted = {*(given.parts or [part.name for part in parts]), *given.again}
    chosen = [part for part in parts if part.name in wanted]
    try:
        run_parts(chosen, results, given)
    finally:  # also after Ctrl+C
        write_text(given.out / "page.md", page_of(results))
    print(f"results: {given.out / 'results.json'}\npage: {given.out / 'page.md'}", flush=True)
    return int(any(results["parts"][part.name]["state"] not in DONE for part in chosen))


def has_gpu() -> bool:
    import torch  # takes seconds, and a rehearsal does not ask

    return torch.cuda.is_available()


def run_parts(chosen: Sequence[Part], results: dict[str, Any], given: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * given.minutes
    for group in [[part] for part in chosen] if given.rehearse else grouped(chosen):
        due = {part.name: part for part in group if is_due(part, results["parts"], deadline)}
        write_json(given.out / "results.json", results)
        commands = {name: limited(part, given) for name, part in due.items()}
        variables = environment(rehearse=given.rehearse)
        for name, code, seconds in run_limited(commands, variables):
            log = commands[name].log.read_text(encoding="utf-8", errors="replace")
            results["parts"][name] = ended = outcome_of(due[name], code, seconds, log)
            write_json(given.out / "results.json", results)
            line = f"{name}: {ended['state']} after {seconds:.0f} s {ended['reason']}"
            print(line.rstrip(), flush=True)


def is_due(part: Part, outcomes: dict[str, Any], deadline: float) -> bool:
    if outcomes.get(part.name, {}).get("state") == FINISHED:
        print(f"{part.name}: has finished before", flush=True)
        return False
    left = deadline - time.monotonic()
    if part.limit_s <= left:
        print(f"{part.name}: at most {part.limit_s:g} s", flush=True)
        return True
    reason = f"the limit of {part.limit_s:g} s does not fit into the last {left:.0f} s"
    print(f"{part.name}: not run, {reason}", flush=True)
    # An earlier try says more.
    outcomes.setdefault(part.name, outcome(part, "not run", reason))
    return False


def limited(part: Part, given: argparse.Namespace) -> Limited:
    folder, log = given.out / "work" / part.name, given.out / "logs" / f"{part.name}.log"
    # What an earlier try has left would be resumed, and an uninterrupted run is what is measured.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Limited(part.command(folder, given.rehearse), log, part.limit_s)


def outcome_of(part: Part, code: int | None, seconds: float, log: str) -> dict[str, Any]:
    """Return the result of a part: why it has not finished, its numbers, the end of its output."""
    reason = last_line(log, SKIPPED)
    state = "skipped" if reason else FINISHED
    if code is None:
        state, reason = "timed out", f"ended at its limit of {part.limit_s:g} s"
    elif code != 0:
        state, reason = "failed", f"exit code {code}"
    lines = [line for line in log.splitlines() if not line.startswith(NUMBERS)]
    return outcome(part, state, reason) | {
        "seconds": round(seconds, 1),
        "numbers": numbers_of(log),
        "tail": "" if state in DONE else "\n".join(lines[-60:]),
    }


def outcome(part: Part, state: str, reason: str) -> dict[str, Any]:
    empty = {"seconds": 0.0, "numbers": {}, "tail": ""}
    return {"state": state, "about": part.about, "reason": reason, **empty}


def parse(arguments: Sequence[str], parts: Sequence[Part] = PARTS) -> argparse.Namespace:
    known = words_of([part.name for part in parts])
    listed = "\n".join(f"  {part.name}: {part.about}" for part in parts)
    parser = parser_of(f"{__doc__}\nparts:\n{listed}")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu-day"), help="folder of the results")
    add("--parts", type=known, help="only these parts, separated by commas")
    add("--again", type=known, default=[], help="repeat these parts although they have finished")
    add("--minutes", type=float, default=30, help="parts that do not fit any more are not run")
    add("--rehearse", action="store_true", help="small sizes on the CPU")
    given = parser.parse_args(arguments)
    given.out = given.out.resolve()
    return given
