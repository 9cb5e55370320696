"""Part of `gpu_day.py`: the same step by megakd, by a bare loop, and by TRL's GKD trainer.

Forward KL of a frozen teacher, random weights in bf16, AdamW. Every entrant runs in a process of
its own on rows of the same lengths. A shape whose rows differ in length is padded by all but
megakd, which packs as many tokens; `tokens` are those that count. Differs from megakd in favour of
the others: their optimizers hold bf16 weights alone, without fp32 masters. An entrant whose package
is missing has a line that says so.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from gpu_day.entrants import ENTRANTS, SHAPES
from gpu_day.process import SKIPPED, last_line, numbers_of, part_parser, say
from lib.launching import BENCHMARKS
from lib.options import words_of

LIMIT_S = 60


def main(arguments: Sequence[str]) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("--shapes", type=words_of([*SHAPES]), default=[*SHAPES])
    parser.add_argument("--entrants", type=words_of([*ENTRANTS]), default=[*ENTRANTS])
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for shape in given.shapes:
        for entrant in given.entrants:
            words = [entrant, shape, "--folder", str(given.folder / shape / entrant)]
            words += ["--rehearse"] if given.rehearse else []
            rows.append({"shape": shape, "entrant": entrant, **outcome_of(words)})
            say({"rows": rows})
    return 0


def outcome_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of an entrant, or why it has none."""
    command = [sys.executable, "-u", str(BENCHMARKS), "gpu_day.entrants", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"not measured, because": f"ended at its limit of {LIMIT_S} s"}
    reason = last_line(done.stdout, SKIPPED)
    if done.returncode and not reason:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"not measured, because": reason} if reason else numbers_of(done.stdout)
