"""The parts of `gpu_day.py`, correctness first: the command of each, and its limit in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
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


def program(name: str, words: str = "", rehearsed: str | None = None) -> Callable[..., list[str]]:
    """Return the command of a program with these words, or those of a rehearsal."""

    def command(setting: Setting) -> list[str]:
        script = [sys.executable, "-u", str(BENCHMARKS), name, "--folder", str(setting.folder)]
        if not setting.rehearse:
            return [*script, *words.split()]
        return [*script, "--rehearse", *(words if rehearsed is None else rehearsed).split()]

    return command


PARTS = (
    Part("kernel-tests", "tests of the Triton kernels", 220, program("gpu_day.kernel_tests")),
    Part(
        "agreement", "Triton against the reference, V = 128256", 120, program("gpu_day.agreement")
    ),
    Part(
        "causal-lm",
        "causal_lm at ZeRO 3 / 3: evaluate, save, kill, resume",
        300,
        program("gpu_day.runs", "causal_lm"),
    ),
    Part(
        "minidisc",
        "MiniDisc at ZeRO 3 / 3: evaluate, save, kill, resume",
        270,
        program("gpu_day.runs", "minidisc"),
    ),
    Part("release", "memory before and after `destroy`", 90, program("gpu_day.release")),
    Part(
        "llama",
        "Llama of 1B weights, bf16, packed 4 x 4096: three steps",
        200,
        program("gpu_day.llama"),
    ),
    Part(
        "bench",
        "`python -m bench`: row kernels, forward KL, products",
        190,
        program(
            "gpu_day.bench",
            "--cases rows,forward_kl,gemms,rows-jsd "
            "--implementations megakd-triton,megakd-gemms,eager,compile,liger-jsd",
            "--cases smoke --implementations megakd-chunked",
        ),
    ),
    Part(
        "more-losses",
        "`python -m bench`: relation, stats, topk",
        100,
        program(
            "gpu_day.bench",
            "--cases relation,stats,topk --implementations megakd-triton,eager",
            "--cases smoke-relation --implementations megakd-chunked",
        ),
    ),
    Part(
        "stages",
        "pipelining depth of the row kernels",
        130,
        program(
            "gpu_day.variants",
            "--variable MEGAKD_ROW_STAGES --values 1,2,3,4 --cases rows,rows-jsd",
            "--variable MEGAKD_ROW_STAGES --values 1,3 --cases rows",
        ),
    ),
    Part(
        "streams",
        "one stream against two streams",
        80,
        program(
            "gpu_day.variants", "--variable MEGAKD_ROW_STREAMS --values 1,2 --cases forward_kl"
        ),
    ),
    Part(
        "chunks",
        "memory of a chunk against time",
        80,
        program(
            "gpu_day.variants",
            "--variable chunk_mb --values 512,1024,2048,4096 --cases forward_kl --rounds 1",
            "--variable chunk_mb --values 512,2048 --cases forward_kl --rounds 1",
        ),
    ),
)
