"""The parts of `gpu_day.py`: the command of each, and its limit in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lib.launching import BENCHMARKS


class Setting(NamedTuple):
    """The folder that a part writes to; `rehearse`: use small sizes on a CPU."""

    folder: Path
    rehearse: bool


class Part(NamedTuple):
    """A command with a limit; `about` is a line for the page."""

    name: str
    about: str
    limit_s: float
    command: Callable[[Setting], list[str]]

    @property
    def is_timed(self) -> bool:
        return self.name not in UNTIMED


def program(words: str, rehearsed: str = "") -> Callable[..., list[str]]:
    """Return the command of a program; `rehearsed`: its options in a rehearsal if they differ."""
    name, *options = words.split()

    def command(setting: Setting) -> list[str]:
        script = [sys.executable, "-u", str(BENCHMARKS), f"gpu_day.{name}"]
        script += ["--folder", str(setting.folder)]
        if not setting.rehearse:
            return [*script, *options]
        return [*script, "--rehearse", *(rehearsed.split() or options)]

    return command


_BENCH = "bench --implementations megakd-triton"
_ROW_STAGES = "--variable MEGAKD_ROW_STAGES"
PARTS = tuple(Part(*row[:3], program(*row[3:])) for row in (
    ("probe", "rates of products and row kernels alone", 90, "probe"),
    ("kernel-tests", "tests of the Triton kernels", 300, "kernel_tests"),
    ("agreement", "Triton against the reference, V = 128256", 120, "agreement"),
    ("causal-lm", "causal_lm at ZeRO 3 / 3: evaluate, save, kill, resume", 300, "runs causal_lm"),
    ("minidisc", "MiniDisc at ZeRO 3 / 3: evaluate, save, kill, resume", 270, "runs minidisc"),
    ("release", "memory before and after `destroy`", 90, "release"),
    ("llama", "Llama of 1B weights, bf16, packed 4 x 4096: three steps", 200, "llama llama"),
    ("smollm2", "SmolLM2-135M from 360M, packed 16 x 2048: three steps", 120, "llama smollm2"),
    ("bench", "`python -m bench`: row kernels, forward KL, products", 300,
     f"{_BENCH},megakd-gemms,eager,compile,trl-tiles,liger-jsd,liger-chunked,liger-kl "
     "--cases rows,forward_kl,gemms,rows-jsd",
     "--cases smoke --implementations megakd-chunked"),
    ("more-losses", "`python -m bench`: relation, stats, topk", 100,
     f"{_BENCH},eager --cases relation,stats,topk",
     "--cases smoke-relation --implementations megakd-chunked"),
    ("stages", "pipelining depth of the row kernels", 130,
     f"variants {_ROW_STAGES} --values 1,2,3,4 --cases rows,rows-jsd",
     f"{_ROW_STAGES} --values 1,3 --cases rows"),
    ("registers", "registers of a thread of the row kernels", 130,
     "variants --variable MEGAKD_ROW_REGISTERS --values 0,64,80 --cases rows,rows-jsd",
     "--variable MEGAKD_ROW_REGISTERS --values 0,64 --cases rows"),
))  # fmt: skip
UNTIMED = ("kernel-tests", "agreement", "causal-lm", "minidisc", "release")
"""They run side by side on a GPU."""
TIMES = ("probe", "agreement", "bench", "stages", "registers", "more-losses")
"""With `--order times`, these come first, and the trainings last."""


def grouped(parts: Sequence[Part]) -> list[list[Part]]:
    """Return the parts in groups that run side by side, in the order of their first parts."""
    beside = [part for part in parts if not part.is_timed]
    return [[part] if part.is_timed else beside for part in parts if part not in beside[1:]]


def ordered(parts: Sequence[Part], order: str) -> list[Part]:
    places = {name: place for place, name in enumerate(TIMES)}
    if order != "times":
        return list(parts)
    return sorted(parts, key=lambda part: places.get(part.name, len(places)))
