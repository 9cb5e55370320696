"""A causal LM step of megakd against an eager bare loop: CPU time in pairs, and memory.

`python benchmarks/causal_step.py [--pairs 20] [--divergences forward_kl,jsd] [--peers | --chat]`,
one rank.

Llamas with random weights, V = 32000: a student of 4 x 256 learns from a teacher of 8 x 512, at
ZeRO 0 in fp32, from 4 x 256 tokens per step, by one soft target and without labels.

* megakd: all that a stage does per step, as in `overhead.py`.
* bare: full logits of both models, log_softmax, the divergence, backward, clipping, AdamW.
* `--peers`: GKDTrainer and DistillationTrainer of TRL, against the same bare loop.
* `--chat`: instead, a step of megakd on chat rows against a step of megakd on text rows, with the
  same tokens; see `causal_step_chat.py`. CPU time only.

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
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import causal_step_chat as chat
import causal_step_trl as trl
import torch
from causal_step_bare import MIXTURES, Bare, loss_of, random_ids, random_models
from causal_step_case import FULL, QUICK, TERMS, write_case
from launching import bench_path, quickstart
from machine import Spread, markdown_row, print_row, spread_of
from options import words_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from causal_step_bare import Side, Steps

TARGET, MEMORY_TARGET = 0.85, 0.5
CLOSE = 1e-4
MEMORY_STEPS = 3
MIXTURE_HELP = "the bare loop's mixture of jsd; stacked is TRL's, which takes longer"


class Seconds(NamedTuple):
    """CPU seconds of one step of each side."""

    side: float
    beside: float


class Result(NamedTuple):
    """Pairs of steps, and the bytes that a step of each side takes."""

    pairs: Sequence[Seconds]
    memory: int
    bare_memory: int

    @property
    def ratio(self) -> Spread:
        """CPU time of a step against that of the bare step beside it."""
        return ratio_of(self.pairs)

    @property
    def memory_ratio(self) -> float:
        """Extra memory against that of the bare loop."""
        return self.memory / max(1, self.bare_memory)


def ratio_of(pairs: Sequence[Seconds]) -> Spread:
    """Return the CPU time of a step against that of the step beside it."""
    return spread_of([pair.side / pair.beside for pair in pairs])


def main(arguments: Sequence[str]) -> int:
    """Measure every divergence in processes of its own, or be one of these processes."""
    given = parse(arguments)
    if given.case is not None:
        measure(given)
        return 0
    print_row("\n".join(chat_rows(given) if given.chat else rows_of(given)))
    return 0


def rows_of(given: argparse.Namespace) -> list[str]:
    """Measure all sides against the bare loop; return the rows for docs/measurements.md."""
    sides = ["megakd", *(trl.available() if given.peers else [])]
    rows = []
    for divergence in given.divergences:
        with tempfile.TemporaryDirectory(prefix="megakd-causal-") as name:
            write_case(Path(name), given.sizes, divergence)
            bare_memory = in_child("bare", "memory", divergence, Path(name), given)
            for side in sides:
                pairs = in_child(side, "pairs", divergence, Path(name), given)
                memory = in_child(side, "memory", divergence, Path(name), given)
                result = Result([Seconds(*pair) for pair in pairs], memory, bare_memory)
                rows.append(show(side, divergence, result, given))
    return rows


def chat_rows(given: argparse.Namespace) -> list[str]:
    """Measure chat rows against text rows; return the rows for docs/measurements.md."""
    rows = []
    for divergence, counted in itertools.product(given.divergences, chat.COUNTED):
        with tempfile.TemporaryDirectory(prefix="megakd-causal-") as name:
            write_case(Path(name), given.sizes, divergence)
            chat.write_chat(Path(name), given.sizes, counted)
            pairs = in_child(counted, "pairs", divergence, Path(name), given)
            rows.append(show_chat(counted, divergence, [Seconds(*pair) for pair in pairs], given))
    return rows


def in_child(side: str, what: str, divergence: str, case: Path, given: argparse.Namespace) -> Any:
    """Return what a process of its own has measured."""
    place = ["--case", str(case), "--side", side, "--what", what, "--divergences", divergence]
    command = [sys.executable, str(Path(__file__)), *given.arguments, *place]
    own = {"OMP_NUM_THREADS": str(given.threads), "PYTHONPATH": bench_path()}
    environment = os.environ | quickstart().ENVIRONMENT | own
    subprocess.run(command, env=environment, check=True)
    return json.loads((case / f"{side}-{what}.json").read_text(encoding="utf-8"))


def measure(given: argparse.Namespace) -> None:
    """Measure one side, and write what was found into the folder of the case."""
    torch.set_num_threads(given.threads)
    if given.chat:
        with chat.opened(given.case, given.warm_up + given.pairs) as sides:
            found = paired(*sides, given, agree=given.side == chat.SAME_TARGETS)
    else:
        measured = extra_memory if given.what == "memory" else beside_bare
        with opened(given) as side:
            found = measured(side, given)
    path = given.case / f"{given.side}-{given.what}.json"
    path.write_text(json.dumps(found), encoding="utf-8")


def opened(given: argparse.Namespace) -> AbstractContextManager[Side]:
    """Build the side that is asked for, with batches for all of its steps."""
    count = given.warm_up + max(given.pairs, MEMORY_STEPS)
    divergence = given.divergences[0]
    if given.side == "megakd":
        import causal_step_megakd

        return causal_step_megakd.opened(given.case, count)
    if given.side == "bare":
        loss = loss_of(divergence, given.mixture)
        return nullcontext(Bare(random_models(given.sizes), random_ids(given.sizes, count), loss))
    return trl.opened(given.side, given.case, given.sizes, divergence, count)


def extra_memory(side: Side, given: argparse.Namespace) -> int:
    """Return the bytes that a step takes beyond what is resident before it, the median of a few."""
    from bench.memory import peak_in_process

    for index in range(given.warm_up):
        side.step(index)
    steps = range(given.warm_up, given.warm_up + MEMORY_STEPS)
    found = [peak_in_process(functools.partial(side.step, index)).bytes_ for index in steps]
    return statistics.median_low(found)


def beside_bare(side: Side, given: argparse.Namespace) -> list[Seconds]:
    """Take the steps of a side and of a bare loop by turns."""
    return paired(side, side.bare(loss_of(given.divergences[0], given.mixture)), given, agree=True)


def paired(side: Steps, beside: Steps, given: argparse.Namespace, *, agree: bool) -> list[Seconds]:
    """Take the steps of both sides by turns; with `agree`, after a look at their losses."""
    if agree:
        check_agree(side, beside, 0)
    for index in range(given.warm_up):
        side.step(index)
        beside.step(index)
    if agree:
        check_agree(side, beside, given.warm_up)
    steps = range(given.warm_up, given.warm_up + given.pairs)
    return [timed_pair(side, beside, index) for index in steps]


def check_agree(side: Steps, beside: Steps, steps: int) -> None:
    """Compare the losses of both sides after so many steps.

    Raises:
        ValueError: they differ, so the sides do not compute the same.
    """
    ours, theirs = side.loss(steps), beside.loss(steps)
    if abs(ours - theirs) > CLOSE * abs(theirs):
        raise ValueError(f"after {steps} steps the loss is {ours}, and the other side's {theirs}")
    print(f"after {steps} steps the losses agree: {ours:.6f} and {theirs:.6f}", flush=True)


def timed_pair(side: Steps, beside: Steps, index: int) -> Seconds:
    """Take both steps of a batch; who goes first changes with the batch."""
    if index % 2:
        first = timed(beside.step, index)
        return Seconds(timed(side.step, index), first)
    first = timed(side.step, index)
    return Seconds(first, timed(beside.step, index))


def timed(step: Callable[[int], None], index: int) -> float:
    """Return the CPU seconds of all threads during a step."""
    began = time.process_time()
    step(index)
    return time.process_time() - began


def show(side: str, divergence: str, result: Result, given: argparse.Namespace) -> str:
    """Print the line of a divergence; return the row for docs/measurements.md."""
    low, high = result.ratio.interval
    side_ms, bare_ms = (1000 * statistics.median(each) for each in zip(*result.pairs, strict=True))
    numbers = f"CPU time {result.ratio.median:.3f} ({side_ms:.0f} against {bare_ms:.0f} ms)"
    numbers += f", extra memory {result.memory_ratio:.2f} ({result.memory / 1e6:.0f} against "
    numbers += f"{result.bare_memory / 1e6:.0f} MB)"
    spread = f"95 %: {low:.3f} to {high:.3f}"
    met = result.ratio.median <= TARGET and result.memory_ratio <= MEMORY_TARGET
    judged = side == "megakd" and given.sizes == FULL
    target = f"; targets {TARGET} and {MEMORY_TARGET}: {'met' if met else 'missed'}"
    print(f"{divergence}, {side}: {numbers}, {spread}{target if judged else ''}", flush=True)
    what = f"{divergence}, a step of {side} against a bare loop, {len(result.pairs)} pairs"
    return markdown_row(what, given.command, numbers, spread)


def show_chat(
    counted: str, divergence: str, pairs: Sequence[Seconds], given: argparse.Namespace
) -> str:
    """Print the line of chat rows; return the row for docs/measurements.md."""
    ratio = ratio_of(pairs)
    low, high = ratio.interval
    chat_ms, text_ms = (1000 * statistics.median(each) for each in zip(*pairs, strict=True))
    numbers = f"CPU time {ratio.median:.4f} ({chat_ms:.1f} against {text_ms:.1f} ms)"
    spread = f"95 %: {low:.4f} to {high:.4f}"
    what = f"{divergence}, a step on chat rows ({chat.COUNTED[counted]}) against text rows"
    met = "met" if ratio.median <= chat.TARGET else "missed"
    target = f"; target {chat.TARGET}: {met}" if given.sizes == FULL else ""
    print(f"{what}: {numbers}, {spread}{target}", flush=True)
    return markdown_row(f"{what}, {len(pairs)} pairs", given.command, numbers, spread)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--pairs", type=int, default=20, help="at least 2")
    parser.add_argument("--warm-up", type=int, default=4, help="steps that do not count")
    parser.add_argument("--divergences", type=words_of(TERMS), default=list(TERMS))
    parser.add_argument("--mixture", choices=MIXTURES, default=MIXTURES[0], help=MIXTURE_HELP)
    parser.add_argument("--threads", type=int, default=1)
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--peers", action="store_true", help="TRL's trainers too")
    others.add_argument("--chat", action="store_true", help="chat rows against text rows")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the program")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.sizes = QUICK if given.quick else FULL
    given.arguments = list(arguments)
    given.command = shlex.join(["python", "benchmarks/causal_step.py", *arguments])
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
