"""Compare planned and measured peak memory of short runs on CPU ranks.

`python benchmarks memory.plan [--cases 1,4]`, one to three minutes a case and at most 5 GB a rank.
Every case is a whole run: each stage trains three steps, evaluates, writes a checkpoint and its
model; then all models are scored and timed, and the report is written. Measured is the peak of the
rank that took the most, process and all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lib.launching import start_ranks
from lib.options import integers, parser_of
from lib.stages import bert_model, step_parser, write_case
from lib.tables import machine
from megakd.config.file import dump_config, load_config
from megakd.config.run import RunConfig

LEAST, MOST = 0.90, 1.25
"""Of a plan, as a share of what was measured."""
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "THP_MEM_ALLOC_ENABLE": "1",
}
RANK = """
import os, pathlib, sys, torch
from megakd.config.file import load_config
from megakd.engine.memory import peak_memory_of_process
from megakd.run.main import run

run(load_config(pathlib.Path(sys.argv[1])), command="python benchmarks memory")
peak = peak_memory_of_process(torch.device("cpu"))
pathlib.Path(sys.argv[2], f"peak-{os.environ['RANK']}").write_text(str(peak))
"""
"""A rank of a run that notes its peak; nothing but what `launch/train.py` imports takes memory."""
ALONE = ("method.name=finetune", "teacher=null", "objective=[{loss: hard_cross_entropy}]")
WHOLE_TEACHER = "teacher.deepspeed=teacher_zero0"
BF16 = (WHOLE_TEACHER, "train.bf16=true", "teacher.dtype=bf16")
FINETUNED = "teacher.finetune={max_steps: 3}"
MINIDISC = (
    "student.model=from_teacher",
    "method={name: minidisc, target_sparsity: 0.9, sparsities: [0.5, 0.7, 0.9]}",
)
MASKED = (
    "task.type=mlm",
    "task.label_column=null",
    "objective=[{loss: soft_target_kl}, {loss: hard_cross_entropy}]",
)


class Case(NamedTuple):
    """A run: sizes are layers x width, `rows` and `length` of a rank's batch.

    teacher: several sizes are a pool of teachers, each of them fine-tuned.
    measured: MB that were measured at dce63b35, without the process.
    """

    ranks: int
    teacher: str
    student: str
    rows: int
    length: int
    settings: tuple[str, ...]
    measured: int

    @property
    def name(self) -> str:
        batch = f"{self.rows} x {self.length}"
        return f"{self.teacher} to {self.student}, {batch}, {' '.join(self.settings)}"


CASES = (
    Case(1, "2x128", "8x512", 2, 32, (*ALONE, "student.deepspeed=zero0"), 882),
    Case(2, "8x512", "6x384", 4, 32, ("student.deepspeed=zero2",), 826),
    Case(2, "8x512", "6x384", 4, 32, ("student.deepspeed=zero3",), 916),
    Case(
        1,
        "4x256",
        "8x512",
        8,
        64,
        ("student.deepspeed=zero3", WHOLE_TEACHER, "train.bf16=true"),
        1389,
    ),
    Case(2, "8x512", "4x512", 4, 64, ("student.deepspeed=zero1", *BF16), 536),
    Case(2, "4x256", "6x512", 16, 64, ("student.deepspeed=zero2", WHOLE_TEACHER), 1211),
    Case(2, "8x640", "4x384", 8, 32, (FINETUNED,), 1177),
    Case(2, "10x768", "8x448", 8, 32, (FINETUNED,), 1705),
    Case(2, "10x1152", "8x640", 8, 32, (FINETUNED,), 3176),
    Case(2, "6x512", "6x512", 8, 32, (FINETUNED, *MINIDISC), 849),
    Case(2, "6x512 4x384 2x256", "4x384", 8, 32, ("method={name: skdbert}",), 760),
    Case(2, "6x512", "4x384", 8, 64, (FINETUNED, *MASKED), 901),
    # Not fitted to.
    Case(
        2,
        "11x1008",
        "7x576",
        8,
        40,
        (FINETUNED, "teacher.model.config.num_attention_heads=12"),
        2796,
    ),
    Case(2, "5x896", "3x320", 12, 48, (FINETUNED,), 1700),
    Case(2, "14x576", "4x640", 4, 96, (FINETUNED, "teacher.finetune.deepspeed=zero3"), 2338),
)


def config_of(case: Case, folder: Path) -> RunConfig:
    given = step_parser(None).parse_args(["--student", case.student])
    given.teacher, given.rows, given.length = case.teacher.split()[0], case.rows, case.length
    write_case(folder, given)
    settings = [
        "train.max_steps=3",
        "log.report_to=[]",
        f"eval.per_device_eval_batch_size={case.rows}",
    ]
    if len(sizes := case.teacher.split()) > 1:
        same = {"finetune": {"max_steps": 3}}
        pool = [{"name": f"t{size}", "model": bert_model(size), **same} for size in sizes]
        settings += ["teacher=null", "objective=null", f"teachers={json.dumps(pool)}"]
    config = load_config(folder / "run.yaml", [*settings, *case.settings])
    (folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    return config


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--cases", type=integers, help="numbers from 1; default: all")
    given = parser.parse_args(arguments)
    chosen = given.cases or range(1, len(CASES) + 1)
    print(f"{machine()}\n\n| run | ranks | planned MB | measured MB | error |\n|{'---|' * 5}")
    errors = []
    for case in (CASES[number - 1] for number in chosen):
        with tempfile.TemporaryDirectory(prefix="megakd-plan-") as name:
            config_of(case, Path(name))
            path = Path(name) / "run.yaml"
            # In a process of its own, because this process has made the data of the case.
            words = [sys.executable, "-m", "megakd", "plan", str(path), "--json"]
            words += ["--ranks", str(case.ranks), "--device", "cpu"]
            plan = subprocess.check_output(words, env=os.environ | ENVIRONMENT)
            planned = json.loads(plan)["peak_bytes_per_rank"]
            program = ["-c", RANK, str(path), name]
            start_ranks(program, case.ranks, environment=ENVIRONMENT, is_quiet=True)
            peaks = (int((Path(name) / f"peak-{n}").read_text()) for n in range(case.ranks))
            measured = max(peaks)
        errors.append(planned / measured)
        megabytes = f"{planned / 1e6:.0f} | {measured / 1e6:.0f}"
        print(f"| {case.name} | {case.ranks} | {megabytes} | {errors[-1] - 1:+.1%} |", flush=True)
    return 0 if min(errors) >= LEAST and max(errors) <= MOST else 1
