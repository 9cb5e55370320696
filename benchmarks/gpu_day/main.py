"""Everything to find out on the first day with a GPU, in one command of at most 30 minutes.

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

from gpu_day.parts import PARTS, Part, Setting, grouped, ordered
from gpu_day.process import (
    Ended,
    Limited,
    environment,
    numbers_of,
    reason_to_skip,
    run_limited,
    tail_of,
)
from gpu_day.results import DONE, FINISHED, Outcome, Results, State, describe, has_gpu, page_of
from lib.launching import UnusableError
from lib.options import parser_of, words_of
from megakd.storage.atomic import write_text


def main(arguments: Sequence[str], parts: Sequence[Part] = PARTS) -> int:
    given = parse(arguments, parts)
    if not given.rehearse and not has_gpu():
        words = "--rehearse runs all parts at small sizes on the CPU"
        print(f"gpu_day: error: torch finds no GPU on this machine; {words}", file=sys.stderr)
        return 1
    try:
        results = Results(given.out, rehearsal=given.rehearse)
    except UnusableError as error:
        print(f"gpu_day: error: {error}", file=sys.stderr)
        return 1
    # A part that hangs is aborted; its tens of gigabytes must not become a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    results.machine = describe(rehearsal=given.rehearse)
    for name in given.again:
        results.parts.pop(name, None)
    results.write()
    wanted = {*(given.parts or [part.name for part in parts]), *given.again}
    chosen = [part for part in ordered(parts, given.order) if part.name in wanted]
    try:
        run_parts(chosen, results, given)
    finally:  # also after Ctrl+C
        page = page_of(results, {part.name: part.about for part in parts}, rehearsal=given.rehearse)
        write_text(given.out / "page.md", page)
    print(f"results: {given.out / 'results.json'}\npage: {given.out / 'page.md'}", flush=True)
    return int(any(results.parts[part.name].state not in DONE for part in chosen))


def run_parts(chosen: Sequence[Part], results: Results, given: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * given.minutes
    for group in [[part] for part in chosen] if given.rehearse else grouped(chosen):
        due = {part.name: part for part in group if is_due(part, results, deadline)}
        commands = {name: limited(part, given) for name, part in due.items()}
        for name, ended in run_limited(commands, environment(rehearse=given.rehearse)):
            log = commands[name].log.read_text(encoding="utf-8", errors="replace")
            results.parts[name] = outcome = outcome_of(due[name], ended, log)
            results.write()
            line = f"{name}: {outcome.state} after {outcome.seconds:.0f} s {outcome.reason}"
            print(line.rstrip(), flush=True)


def is_due(part: Part, results: Results, deadline: float) -> bool:
    if results.is_finished(part.name):
        print(f"{part.name}: has finished before", flush=True)
        return False
    left = deadline - time.monotonic()
    if part.limit_s <= left:
        print(f"{part.name}: at most {part.limit_s:g} s", flush=True)
        return True
    reason = f"the limit of {part.limit_s:g} s does not fit into the last {left:.0f} s"
    print(f"{part.name}: not run, {reason}", flush=True)
    # An earlier try says more.
    outcome = Outcome(state="not run", about=part.about, reason=reason)
    results.parts.setdefault(part.name, outcome)
    results.write()
    return False


def limited(part: Part, given: argparse.Namespace) -> Limited:
    folder, log = given.out / "work" / part.name, given.out / "logs" / f"{part.name}.log"
    # What an earlier try has left would be resumed, and an uninterrupted run is what is measured.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Limited(part.command(Setting(folder, given.rehearse)), log, part.limit_s)


def outcome_of(part: Part, ended: Ended, log: str) -> Outcome:
    state: State = FINISHED
    reason = reason_to_skip(log)
    if ended.code is None:
        state, reason = "timed out", f"ended at its limit of {part.limit_s:g} s"
    elif ended.code != 0:
        state, reason = "failed", f"exit code {ended.code}"
    elif reason:
        state = "skipped"
    return Outcome(
        state=state,
        about=part.about,
        reason=reason,
        seconds=round(ended.seconds, 1),
        numbers=numbers_of(log),
        tail="" if state in DONE else tail_of(log),
    )


def parse(arguments: Sequence[str], parts: Sequence[Part] = PARTS) -> argparse.Namespace:
    known = words_of([part.name for part in parts])
    listed = "\n".join(f"  {part.name}: {part.about}" for part in parts)
    parser = parser_of(f"{__doc__}\nparts:\n{listed}")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu-day"), help="folder of the results")
    add("--parts", type=known, help="only these parts, separated by commas")
    add("--again", type=known, default=[], help="repeat these parts although they have finished")
    add("--order", choices=("training", "times"), default="training", help="what comes first")
    add("--minutes", type=float, default=30, help="parts that do not fit any more are not run")
    add("--rehearse", action="store_true", help="small sizes on the CPU")
    given = parser.parse_args(arguments)
    given.out = given.out.resolve()
    return given
