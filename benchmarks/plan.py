"""Compare predicted and measured peak memory of short runs on CPU ranks.

`python benchmarks/plan.py [--cases 1,4]`, one to three minutes a case and at most 5 GB a rank.
Every case is a whole run: each stage trains three steps, evaluates, writes a checkpoint and its
model; then all models are scored and timed, and the report is written. Measured is the peak of the
rank that took the most, less what the plan says a process takes before its models.
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

from megakd.config.file import dump_config, load_config
from megakd.planning.cluster import Cluster
from megakd.planning.plan import plan_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megakd.config.run import RunConfig

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
    """

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
    Case(2, "8x640", "4x384", 8, 32, (FINETUNED,)),
    Case(2, "10x768", "8x448", 8, 32, (FINETUNED,)),
    Case(2, "10x1152", "8x640", 8, 32, (FINETUNED,)),
    Case(2, "6x512", "6x512", 8, 32, (FINETUNED, *MINIDISC)),
    Case(2, "6x512 4x384 2x256", "4x384", 8, 32, ("method={name: skdbert}",)),
    Case(2, "6x512", "4x384", 8, 64, (FINETUNED, *MASKED)),
    # Not fitted to.
    Case(2, "11x1008", "7x576", 8, 40, (FINETUNED, "teacher.model.config.num_attention_heads=12")),
    Case(2, "5x896", "3x320", 12, 48, (FINETUNED,)),
    Case(2, "14x576", "4x640", 4, 96, (FINETUNED, "teacher.finetune.deepspeed=zero3")),
)


class Compared(NamedTuple):
    """Bytes of the rank that took the most, beside the process itself."""

    predicted: int
    measured: int

    @property
    def error(self) -> float:
        """The error of the prediction, as a share of the measured bytes."""
        return self.predicted / self.measured - 1


def compared(case: Case, folder: Path) -> Compared:
    """Plans a case, then runs it in a folder of its own.

    Raises:
        RuntimeError: a rank failed.
    """
    config = config_of(case, folder)
    plan = plan_run(config, Cluster(ranks=case.ranks), advise=False)
    measured = max(peaks_of(folder / "run.yaml", case.ranks))
    return Compared(plan.peak_bytes_per_rank, measured - _base_bytes())


def _base_bytes() -> int:
    """What `megakd plan` says that a process takes before its models.

    In a process of its own, because this process has made the data of the case.
    """
    code = "from megakd.planning.plan import host_base_bytes; print(host_base_bytes())"
    said = subprocess.check_output([sys.executable, "-c", code], env=os.environ | ENVIRONMENT)
    return int(said.splitlines()[-1])


def config_of(case: Case, folder: Path) -> RunConfig:
    """The run config of a case, written with its data."""
    overhead_case.write_case(
        folder,
        argparse.Namespace(
            teacher=case.teacher.split()[0],
            student=case.student,
            rows=case.rows,
            length=case.length,
            vocabulary=30522,
            deepspeed="zero2",
            teacher_deepspeed="teacher_zero3",
        ),
    )
    scored = f"eval.per_device_eval_batch_size={case.rows}"
    settings = [*FEW, scored, *_pool(case.teacher.split()), *case.settings]
    config = load_config(folder / "run.yaml", settings)
    (folder / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    return config


def _pool(sizes: Sequence[str]) -> list[str]:
    """The settings that put several teachers in place of one."""
    if len(sizes) == 1:
        return []
    teachers = [
        {"name": f"t{size}", "model": overhead_case.bert(size), "finetune": {"max_steps": 3}}
        for size in sizes
    ]
    return ["teacher=null", "objective=null", f"teachers={json.dumps(teachers)}"]


def peaks_of(config: Path, ranks: int, *, timeout: float = 570) -> list[int]:
    """The most memory that each rank of a run took."""
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
    return [int(out.splitlines()[-1]) for out in said]


def run_rank(path: Path) -> None:
    """One rank of a run, as `launch/train.py` starts it."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from megakd.engine.memory import peak_memory_of_process
    from megakd.run.main import run

    run(load_config(path), command="python benchmarks/plan.py")
    print(peak_memory_of_process(torch.device("cpu")), flush=True)


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
