"""Starts megakd's public command, or ranks of a benchmark's own, and reads what they leave."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path("../shared/data")
FETCHED_TEACHER = Path("runs/quickstart-teacher")


class RunFailedError(Exception):
    """The command ended without a report."""


def quickstart() -> ModuleType:
    """launch/quickstart.py, which knows where the teacher comes from."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "launch" / "quickstart.py")
    if spec is None or spec.loader is None:
        raise ImportError("launch/quickstart.py cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fetch_teacher() -> Path:
    """The folder of all-MiniLM-L6-v2, fetched if it is not there."""
    program = quickstart()
    if not program.is_intact(ROOT / FETCHED_TEACHER):
        program.fetch_teacher(ROOT / FETCHED_TEACHER, ROOT / program.REQUIREMENT)
    return FETCHED_TEACHER


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """A run config as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    return path


def trained(
    config: Path, output: Path, *, ranks: int, overrides: Sequence[str], jobs: int = 1
) -> dict[str, Any]:
    """The report of a run, which is started, resumed, or has finished before.

    Args:
        config: the run's YAML file, seen from the repository.
        output: the folder that the run writes.
        ranks: CPU processes; the cores are shared among them.
        overrides: `key=value` that win over the file's.
        jobs: as many runs share the cores.

    Raises:
        RunFailedError: the command failed, or ended without a report.
    """
    code = launched("train", config, ranks, [*overrides, f"output_dir={output}"], jobs)
    report = ROOT / output / "report.json"
    # The launcher also returns 0 when a rank was killed by a signal.
    if code != 0 or not report.is_file():
        raise RunFailedError(f"{config}: exit code {code}, and {report} does not exist")
    return json.loads(report.read_text(encoding="utf-8"))


def launched(
    program: str, config: Path, ranks: int, overrides: Sequence[str], jobs: int = 1
) -> int:
    """The exit code of `launch/<program>.py` with a run config, one of `jobs` side by side."""
    command = launch_command(program, config, ranks, overrides)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (ranks * jobs)))}
    environment = os.environ | quickstart().ENVIRONMENT | threads
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def launch_command(program: str, config: Path, ranks: int, overrides: Sequence[str]) -> list[str]:
    """Plain python for one rank, DeepSpeed's launcher for more."""
    script = [f"launch/{program}.py", "--config", str(config), *overrides]
    if ranks == 1:
        return [sys.executable, "-u", *script]
    return under_launcher(script, ranks, on_cpu=True)


def under_launcher(script: Sequence[str], ranks: int, *, on_cpu: bool) -> list[str]:
    """The command that runs a script of Python on ranks of this machine, on a free port."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    places = ["--num_gpus", str(ranks), "--master_port", str(quickstart().free_port())]
    if on_cpu:
        # The launcher shows GPUs to its ranks, also to those on the CPU: hide them again.
        hidden = ["--no_python", "--no_local_rank", "env", "CUDA_VISIBLE_DEVICES="]
        script = [*hidden, sys.executable, "-u", *script]
    return [*launcher, *places, *script]


def bench_path() -> str:
    """PYTHONPATH with the folder of `bench`, which is no installed package."""
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


def start_ranks(program: Path, arguments: Sequence[str], ranks: int) -> int:
    """Run a program once per rank, with the cores shared among them.

    Returns:
        The exit code of the worst. A rank that fails ends the others, which would wait for it.
    """
    port = quickstart().free_port()
    threads = max(1, (os.cpu_count() or 1) // ranks)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    shared = os.environ | quickstart().ENVIRONMENT
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
        own = {key: str(value) for key, value in {**place, **meeting}.items()}
        processes.append(
            subprocess.Popen([sys.executable, str(program), *arguments], env=shared | own)
        )
    try:
        return _worst_code(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        # DeepSpeed leaves its shared memory behind, under the number of the port.
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):  # noqa: S108
            buffer.unlink(missing_ok=True)


def _worst_code(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks have ended, or until the first one fails."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [abs(code) for code in codes if code]
        if failed or None not in codes:
            return max(failed, default=0)
        time.sleep(0.1)
