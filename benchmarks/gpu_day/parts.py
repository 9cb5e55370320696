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


def program(name: str, setting: Setting, *words: str) -> list[str]:
    """Return the command of a part that has a program of its own."""
    script = [sys.executable, "-u", str(BENCHMARKS), name, "--folder", str(setting.folder)]
    return [*script, *(["--rehearse"] if setting.rehearse else []), *words]


def started(name: str, *words: str) -> Callable[[Setting], list[str]]:
    """Return the command of a part whose words are the same at all sizes."""
    return lambda setting: program(name, setting, *words)


def bench(setting: Setting) -> list[str]:
    """Time the losses of a vocabulary, and the row kernels alone."""
    cases = ("rows", "forward_kl", "gemms", "rows-jsd")
    implementations = ("megakd-triton", "megakd-gemms", "eager", "compile", "liger-jsd")
    return _bench(setting, ("smoke",) if setting.rehearse else cases, implementations)


def more_losses(setting: Setting) -> list[str]:
    cases = ("relation", "stats", "topk")
    rehearsed = ("smoke-relation",)
    return _bench(setting, rehearsed if setting.rehearse else cases, ("megakd-triton", "eager"))


def _bench(setting: Setting, cases: tuple[str, ...], implementations: tuple[str, ...]) -> list[str]:
    who = ("megakd-chunked",) if setting.rehearse else implementations
    return program(
        "gpu_day.bench", setting, "--cases", ",".join(cases), "--implementations", ",".join(who)
    )


def stages(setting: Setting) -> list[str]:
    """Time the row kernels with every depth of pipelining."""
    values = "1,3" if setting.rehearse else "1,2,3,4"
    cases = "rows" if setting.rehearse else "rows,rows-jsd"
    return _variants(setting, "MEGAKD_ROW_STAGES", values, cases)


def streams(setting: Setting) -> list[str]:
    """Time the whole loss with one stream and with two streams."""
    return _variants(setting, "MEGAKD_ROW_STREAMS", "1,2", "forward_kl")


def chunks(setting: Setting) -> list[str]:
    """Time the whole loss with chunks of several sizes."""
    values = "512,2048" if setting.rehearse else "512,1024,2048,4096"
    return [*_variants(setting, "chunk_mb", values, "forward_kl"), "--rounds", "1"]


def _variants(setting: Setting, variable: str, values: str, cases: str) -> list[str]:
    words = ("--variable", variable, "--values", values, "--cases", cases)
    return program("gpu_day.variants", setting, *words)


PARTS = (
    Part("kernel-tests", "tests of the Triton kernels", 220, started("gpu_day.kernel_tests")),
    Part(
        "agreement", "Triton against the reference, V = 128256", 120, started("gpu_day.agreement")
    ),
    Part(
        "causal-lm",
        "causal_lm at ZeRO 3 / 3: evaluate, save, kill, resume",
        300,
        started("gpu_day.runs", "causal_lm"),
    ),
    Part(
        "minidisc",
        "MiniDisc at ZeRO 3 / 3: evaluate, save, kill, resume",
        270,
        started("gpu_day.runs", "minidisc"),
    ),
    Part("release", "memory before and after `destroy`", 90, started("gpu_day.release")),
    Part(
        "llama",
        "Llama of 1B weights, bf16, packed 4 x 4096: three steps",
        200,
        started("gpu_day.llama"),
    ),
    Part("bench", "`python -m bench`: row kernels, forward KL, products", 190, bench),
    Part("more-losses", "`python -m bench`: relation, stats, topk", 100, more_losses),
    Part("stages", "pipelining depth of the row kernels", 130, stages),
    Part("streams", "one stream against two streams", 80, streams),
    Part("chunks", "memory of a chunk against time", 80, chunks),
)
