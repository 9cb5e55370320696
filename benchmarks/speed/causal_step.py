"""A causal LM step of megakd against an eager bare loop: CPU time in pairs, and memory.

`python benchmarks speed.causal_step [--pairs 20] [--divergences forward_kl,jsd]
[--peers | --chat]`, one rank.

Llamas with random weights, V = 32000: a student of 4 x 256 learns from a teacher of 8 x 512, at
ZeRO 0 in fp32, from 4 x 256 tokens per step, by one soft target and without labels.

* megakd: all that a stage does per step, as in `speed.overhead`.
* bare: full logits of both models, log_softmax, the divergence, backward, clipping, AdamW.
* `--peers`: GKDTrainer and DistillationTrainer of TRL, against the same bare loop.
* `--chat`: instead, a step of megakd on chat rows against a step of megakd on text rows, with the
  same tokens; see `causal_megakd.py`. CPU time only.

Both sides of a pair start from the same weights, and take the same batches by turns in one process.
Their losses must agree before the first step and after the warm-up. The extra memory of a step is
the peak of resident memory above what was resident before the step, of each side in a process of
its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from lib.launching import BENCHMARKS, bench_path, quickstart
from lib.options import parsed, parser_of, words_of
from lib.tables import print_rows, ratio_of
from speed import causal_trl as trl
from speed.causal_bare import (
    CHAT_TARGET,
    COUNTED,
    FULL,
    LOSSES,
    QUICK,
    SAME_TARGETS,
    TERMS,
    Bare,
    paired,
    random_ids,
    random_models,
    write_case,
    write_chat,
)

TARGET, MEMORY_TARGET = 0.85, 0.5
MEMORY_STEPS = 3
Row = tuple[str, str, str]


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        measure(given)
        return 0
    print_rows(given.command, *(chat_rows(given) if given.chat else rows_of(given)))
    return 0


def rows_of(given: argparse.Namespace) -> list[Row]:
    sides = ["megakd", *(trl.available() if given.peers else [])]
    rows = []
    for divergence in given.divergences:
        with tempfile.TemporaryDirectory(prefix="megakd-causal-") as name:
            write_case(Path(name), given.sizes, divergence)
            bare_memory = in_child("bare", "memory", divergence, Path(name), given)
            for side in sides:
                pairs = in_child(side, "pairs", divergence, Path(name), given)
                memory = in_child(side, "memory", divergence, Path(name), given)
                rows.append(row_of(f"{divergence}, {side}", pairs, (memory, bare_memory), given))
    return rows


def chat_rows(given: argparse.Namespace) -> list[Row]:
    rows = []
    for divergence, counted in itertools.product(given.divergences, COUNTED):
        with tempfile.TemporaryDirectory(prefix="megakd-causal-") as name:
            write_case(Path(name), given.sizes, divergence)
            write_chat(Path(name), given.sizes, counted)
            pairs = in_child(counted, "pairs", divergence, Path(name), given)
        what = f"{divergence}, a step on chat rows ({COUNTED[counted]}) against text rows"
        rows.append(row_of(what, pairs, None, given))
    return rows


def in_child(side: str, what: str, divergence: str, case: Path, given: argparse.Namespace) -> Any:
    place = ["--case", str(case), "--side", side, "--what", what, "--divergences", divergence]
    command = [sys.executable, str(BENCHMARKS), __name__, *given.arguments, *place]
    changes = {"OMP_NUM_THREADS": str(given.threads), "PYTHONPATH": bench_path()}
    environment = os.environ | quickstart().ENVIRONMENT | changes
    subprocess.run(command, env=environment, check=True)
    return json.loads((case / f"{side}-{what}.json").read_text(encoding="utf-8"))


def measure(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    if given.chat:
        from speed.causal_megakd import opened_chat

        with opened_chat(given.case, given.warm_up + given.pairs) as sides:
            found: Any = paired(*sides, given, agree=given.side == SAME_TARGETS)
    else:
        with opened(given) as side:
            found = extra_memory(side, given) if given.what == "memory" else beside(side, given)
    path = given.case / f"{given.side}-{given.what}.json"
    path.write_text(json.dumps(found), encoding="utf-8")


def opened(given: argparse.Namespace) -> AbstractContextManager[Any]:
    """Build the side that is asked for, with batches for all of its steps."""
    count = given.warm_up + max(given.pairs, MEMORY_STEPS)
    divergence = given.divergences[0]
    if given.side == "megakd":
        # The memory of the bare loop is that of a process without megakd's engines.
        from speed.causal_megakd import opened as opened_megakd

        return opened_megakd(given.case, count)
    if given.side == "bare":
        models, ids = random_models(given.sizes), random_ids(given.sizes, count)
        return nullcontext(Bare(models, ids, LOSSES[divergence]))
    return trl.opened(given.side, given.case, given.sizes, divergence, count)


def extra_memory(side: Any, given: argparse.Namespace) -> int:
    """Return the bytes that a step takes beyond what is resident before it, the median of a few."""
    from bench.memory import peak_in_process

    for index in range(given.warm_up):
        side.step(index)
    steps = range(given.warm_up, given.warm_up + MEMORY_STEPS)
    peaks = [peak_in_process(functools.partial(side.step, index)).bytes_ for index in steps]
    return statistics.median_low(peaks)


def beside(side: Any, given: argparse.Namespace) -> list[list[float]]:
    return paired(side, side.bare(LOSSES[given.divergences[0]]), given, agree=True)


def row_of(
    what: str,
    pairs: Sequence[Sequence[float]],
    memory: tuple[int, int] | None,
    given: argparse.Namespace,
) -> Row:
    ratio = ratio_of(pairs)
    ours, theirs = (1000 * statistics.median(each) for each in zip(*pairs, strict=True))
    numbers = f"CPU time {ratio.median:.4f} ({ours:.1f} against {theirs:.1f} ms)"
    met, targets = ratio.median <= CHAT_TARGET, f"{CHAT_TARGET}"
    if memory is not None:
        share = memory[0] / max(1, memory[1])
        numbers += f", extra memory {share:.2f} ({memory[0] / 1e6:.0f} against "
        numbers += f"{memory[1] / 1e6:.0f} MB)"
        met = ratio.median <= TARGET and share <= MEMORY_TARGET
        targets = f"{TARGET} and {MEMORY_TARGET}"
        what = f"{what}, a step against a bare loop"
    spread = f"95 %: {ratio.between(4)}"
    judged = given.sizes == FULL and (memory is None or ", megakd," in what)
    target = f"; target {targets}: {'met' if met else 'missed'}" if judged else ""
    print(f"{what}: {numbers}, {spread}{target}", flush=True)
    return f"{what}, {len(pairs)} pairs", numbers, spread


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="at least 2")
    parser.add_argument("--warm-up", type=int, default=4, help="steps that do not count")
    parser.add_argument("--divergences", type=words_of(TERMS), default=list(TERMS))
    parser.add_argument("--threads", type=int, default=1)
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--peers", action="store_true", help="TRL's trainers too")
    others.add_argument("--chat", action="store_true", help="chat rows against text rows")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the program")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    given = parsed(parser, __name__, arguments)
    given.sizes = QUICK if given.quick else FULL
    return given
