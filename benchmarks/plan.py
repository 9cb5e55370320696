"""Whether `megakd plan` is true: predicted and measured peak memory of short runs on CPU ranks.

`python benchmarks/plan.py [--cases 1,4]`, about a minute a case and below 2 GB a rank. Every case
trains three steps, evaluates, writes a checkpoint and the model. Measured is what report.json says
of the stage, `peak_memory_bytes`, less what the plan says a process takes before its models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import overhead_case
from machine import machine
from options import integers

from megakd.config_file import dump_config, load_config
from megakd.memory_plan import plan_run
from megakd.planning.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megakd.config import RunConfig

TOLERANCE = 0.10
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
FEW = ("train.max_steps=3", "log.report_to=[]")
ALONE = ("method.name=finetune", "teacher=null", "objective=[{loss: hard_cross_entropy}]")
WHOLE_TEACHER = "teacher.deepspeed=teacher_zero0"


class Case(NamedTuple):
    """A run: sizes are layers x width, `rows` and `length` of a rank's batch."""

    ranks: int
    teacher: str
    student: str
    rows: int
    length: int
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        """In a table."""
        batch = f"{self.rows} x {self.length}"
        return f"{self.teacher} to {self.student}, {batch}, {' '.join(self.settings)}"


CASES = (
    Case(1, "2x128", "8x512", 2, 32, (*ALONE, "student.deepspeed=zero0")),
    Case(2, "8x512", "6x384", 4, 32, ("student.deepspeed=zero2",)),
    Case(2, "8x512", "6x384", 4, 32, ("student.deepspeed=zero3",)),
    Case(1, "4x256", "8x512", 8, 64, ("student.deepspeed=zero3", WHOLE_TEACHER, "train.bf16=true")),
    Case(
        2,
        "8x512",
        "4x512",
        4,
        64,
        ("student.deepspeed=zero1", WHOLE_TEACHER, "train.bf16=true", "teacher.dtype=bf16"),
    ),
    Case(2, "4x256", "6x512", 16, 64, ("student.deepspeed=zero2", WHOLE_TEACHER)),
)


class Compared(NamedTuple):
    """Bytes of the rank that took the most, beside the process itself."""

    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


def compared(case: Case, folder: Path) -> Compared:
    """Plans a case, then runs it in a folder of its own.

    Raises:
        RuntimeError: a rank failed.
    """
    config = config_of(case, folder)
    plan = plan_run(config, Cluster(ranks=case.ranks), advise=False)
    measured = max(peaks_of(folder / "run.yaml", case.ranks))
    return Compared(plan.peak_bytes_per_rank, measured - plan.host_base_bytes)


def config_of(case: Case, folder: Path) -> RunConfig:
    """The run config of a case, written with its data."""
    overhead_case.write_case(
        folder,
        argparse.Namespace(
            teacher=case.teacher,
            student=case.student,
            rows=case.rows,
            length=case.length,
            vocabulary=30522,
            deepspeed="zero2",
            teacher_deepspeed="teacher_zero3",
        ),
    )
    scored = f"eval.per_device_eval_batch_size={case.rows}"
    config = load_config(folder / "run.yaml", [*FEW, scored, *case.settings])
    (folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    return config


def peaks_of(config: Path, ranks: int, *, timeout: float = 300) -> list[int]:
    """What the stages of a run report as their peak memory, the largest of all ranks."""
    from megakd.engine.distributed import free_port

    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
        environment = {key: str(value) for key, value in place.items()} | meeting | ENVIRONMENT
        command = [sys.executable, __file__, "--rank", str(config)]
        processes.append(
            subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE)
        )
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank of {config} failed")
    return json.loads(said[0].splitlines()[-1])


def run_rank(path: Path) -> None:
    """One rank of a run, as `launch/train.py` starts it, up to the end of its stages."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from megakd.lab import Lab
    from megakd.methods import run_method
    from megakd.preparation import prepare
    from megakd.progress import Reporter
    from megakd.run import started

    config = load_config(path)
    with started() as ranks:
        reporter = Reporter(config.output_dir, is_main=ranks.is_main)
        lab = Lab(config, prepare(config), ranks, reporter)
        run_method(config.method, lab)
        reporter.close()
        print(json.dumps([result.peak_memory_bytes for result in lab.results]), flush=True)


def main(arguments: Sequence[str]) -> int:
    """Compares all cases and prints a table; 1 where one is further off than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cases", type=integers, help="numbers from 1, joined by commas; default: all"
    )
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.rank is not None:
        run_rank(given.rank)
        return 0
    numbers = range(1, len(CASES) + 1)
    chosen = given.cases or list(numbers)
    print(f"{machine()}\n\n| run | ranks | predicted MB | measured MB | error |\n|{'---|' * 5}")
    worst = 0.0
    for case in (CASES[number - 1] for number in chosen):
        with tempfile.TemporaryDirectory(prefix="megakd-plan-") as name:
            found = compared(case, Path(name))
        worst = max(worst, abs(found.error))
        megabytes = f"{found.predicted / 1e6:.0f} | {found.measured / 1e6:.0f}"
        print(f"| {case.name} | {case.ranks} | {megabytes} | {found.error:+.1%} |", flush=True)
    return 1 if worst > TOLERANCE else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
