"""Fused layers on a CPU: CPU time of a step with and without them, in pairs, and of compiling.

`python benchmarks speed.fused_layers [--pairs 12]`, one rank with one thread.

SmolLM2-135M-Instruct teaches a model of half its layers, from 2 x 256 tokens per step, by one soft
target, in bf16 and in fp32. The quickstart's teacher, a BERT, is asked for parts to fuse first.

A pair is one step with `train.fused_layers: on` and one with `off`, by turns in one process: all
that a stage does per step, as in `speed.overhead`. Compiling, with an empty cache, is the time of
the first steps beyond that of as many later ones, with that of the C++ compiler; it counts once in
a run of 200 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModel

from lib.clocks import by_turns, line
from lib.instruct import write_model
from lib.launching import BENCHMARKS, ROOT, fetch_teacher, quickstart, write_config
from lib.options import parsed, parser_of
from lib.stages import measured_stage
from lib.tables import print_rows, ratio_of
from megakd.config.file import load_config
from megakd.models.fused_layers import fused_forwards
from megakd.run.main import started
from speed.causal_step import QUICK, RUN, Sizes, write_case

SMOLLM2 = ROOT / "runs/bench/smollm2"
SIZES = Sizes((15, 576), (30, 576), vocabulary=49152, rows=2, length=256, head=64)
DTYPES, CHOICES = ("bf16", "fp32"), ("on", "off")
STEPS, WARM_UP = 200, 3
MEASURED = "measured.json"


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        measure(given.case, given.pairs)
        return 0
    if not given.quick:
        write_model(SMOLLM2)
        bert = AutoModel.from_pretrained(fetch_teacher())
        print(f"the quickstart's teacher has {len(fused_forwards(bert))} parts to fuse")
    rows = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory(prefix="megakd-fused-") as name:
            write_configs(Path(name), dtype, is_quick=given.quick)
            changes = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": f"{name}/compiled"}
            # Compilers are children of the process: the time of a pool could not be read.
            changes |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
            words = [str(BENCHMARKS), __name__, *given.arguments, "--case", name]
            environment = os.environ | quickstart().ENVIRONMENT | changes
            subprocess.run([sys.executable, *words], env=environment, check=True)
            measured = json.loads((Path(name) / MEASURED).read_text(encoding="utf-8"))
        rows.append(row_of(dtype, measured[:WARM_UP], measured[WARM_UP:]))
    print_rows(given.command, *rows)
    return 0


def write_configs(folder: Path, dtype: str, *, is_quick: bool) -> None:
    """Write rows of random words, and a config for each choice."""
    write_case(folder, QUICK if is_quick else SIZES, "forward_kl")
    tree = yaml.safe_load((folder / RUN).read_text(encoding="utf-8"))
    tree["teacher"]["dtype"], tree["train"]["bf16"] = dtype, dtype == "bf16"
    if not is_quick:
        shape = json.loads((SMOLLM2 / "config.json").read_text(encoding="utf-8"))
        shape = {key: value for key, value in shape.items() if not key.startswith("_")}
        shape["num_hidden_layers"] = SIZES.student[0]
        tree["teacher"]["model"], tree["student"]["model"] = str(SMOLLM2), {"config": shape}
        del tree["task"]["tokenizer"]
    for choice in CHOICES:
        tree["output_dir"], tree["train"]["fused_layers"] = str(folder / choice), choice
        write_config(folder / f"{choice}.yaml", tree)


def spent() -> float:
    """Return the CPU time of the process and of its children that have ended."""
    return time.process_time() + sum(os.times()[2:4])


def measure(case: Path, pairs: int) -> None:
    torch.set_num_threads(1)
    configs = [load_config(case / f"{choice}.yaml") for choice in CHOICES]
    with started(configs[0]) as ranks, ExitStack() as stack:
        stages = [stack.enter_context(measured_stage(config, ranks))[0] for config in configs]
        every: Any = [stage.steps_one_by_one() for stage in stages]

        def seconds(steps: Iterator[None]) -> float:
            before = spent()
            next(steps)
            return spent() - before

        sides = [lambda _, steps=steps: seconds(steps) for steps in every]
        measured = by_turns(sides, WARM_UP + pairs)
        for steps in every:
            steps.close()  # ends the loader's thread
    (case / MEASURED).write_text(json.dumps(measured), encoding="utf-8")


def row_of(
    dtype: str, first: Sequence[Sequence[float]], pairs: Sequence[Sequence[float]]
) -> tuple[str, str, str]:
    ratio = ratio_of(pairs)
    fused, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
    compiling = sum(pair[0] for pair in first) - len(first) * fused
    whole = (compiling + STEPS * fused) / (STEPS * plain)
    print(f"{dtype}: fused against plain, CPU time of a step {line(ratio)}", flush=True)
    numbers = f"CPU time of a step {ratio.median:.3f} ({fused:.2f} against {plain:.2f} s), "
    numbers += f"compiling {compiling:.0f} s, {STEPS} steps with it {whole:.3f}"
    what = f"{dtype}, a step with fused layers against one without, {len(pairs)} pairs"
    return what, numbers, f"95 %: {ratio.between()}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=12, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the program")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    return parsed(parser, __name__, arguments)
