"""The parts of `gpu_day.py`: the command of each, and its limit in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.launching import BENCHMARKS


class Part(NamedTuple):
    """A program with a limit; `about` is a line for the page.

    command: returns the command of a folder to write to, at small sizes on a CPU if `rehearse`.
    """

    name: str
    about: str
    limit_s: float
    command: Callable[[Path, bool], list[str]]


def program(words: str, rehearsed: str = "") -> Callable[[Path, bool], list[str]]:
    """Return the command of a program; `rehearsed`: its options in a rehearsal if they differ."""
    name, *options = words.split()

    def command(folder: Path, rehearse: bool) -> list[str]:  # noqa: FBT001
        script = [sys.executable, "-u", str(BENCHMARKS), f"gpu_day.{name}", "--folder", str(folder)]
        if not rehearse:
            return [*script, *options]
        return [*script, "--rehearse", *(rehearsed.split() or options)]

    return command


_BENCH = "bench --implementations megakd-triton"
_REHEARSED = "--implementations megakd-chunked --cases"
PARTS = tuple(Part(*row[:3], program(*row[3:])) for row in (
    ("kernel-tests", "tests of the Triton kernels", 300, "kernel_tests"),
    ("agreement", "Triton against the reference, V = 128256", 120, "agreement"),
    ("causal-lm", "causal_lm at ZeRO 3 / 3: evaluate, save, kill, resume", 300, "runs causal_lm"),
    ("minidisc", "MiniDisc at ZeRO 3 / 3: evaluate, save, kill, resume", 270, "runs minidisc"),
    ("release", "memory before and after `destroy`", 90, "release"),
    ("llama", "Llama of 1B weights, bf16, packed 4 x 4096: three steps", 200, "llama llama"),
    ("llama-untried", "The same, fused, clipped on the device", 200, "llama llama-untried"),
    ("smollm2", "SmolLM2-135M from 360M, packed 16 x 2048: three steps", 120, "llama smollm2"),
    ("race", "the step of megakd, of a bare loop, and of TRL's GKD with and without Liger", 300,
     "race"),
    ("billion", "MiniDisc on a Llama of 1.2B weights at ZeRO 3 / 3: plan, kill, resume", 400,
     "runs billion"),
    ("bench", "`python -m bench`: row kernels, forward KL, products", 300,
     f"{_BENCH},megakd-gemms,eager,compile,trl-tiles,liger-jsd,liger-chunked,liger-kl "
     "--cases rows,forward_kl,gemms,rows-jsd", f"{_REHEARSED} smoke"),
    ("more-losses", "`python -m bench`: relation, stats, topk", 100,
     f"{_BENCH},eager --cases relation,stats,topk", f"{_REHEARSED} smoke-relation"),
))  # fmt: skip
UNTIMED = ("kernel-tests", "agreement", "causal-lm", "minidisc", "release")
"""They run side by side on a GPU."""


def grouped(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts in groups that run side by side, in the order of their first parts."""
    beside = [part for part in parts if part.name in UNTIMED]
    return [beside if part in beside else [part] for part in parts if part not in beside[1:]]
