"""Starts runs of megakd or ranks of a benchmark, and reads what they leave.

A leg is a run in a folder of its own: it is resumed where it was, and a finished leg is not
repeated.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml

from megakd.config.file import config_tree, load_config
from megakd.process.record import differences, flatten

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
SHARED = Path("../shared/data")
Report = Mapping[str, Any]


class RunFailedError(Exception):
    """The command ended without a report."""


class UnusableError(Exception):
    """The benchmark cannot run here."""


class Leg(NamedTuple):
    """One run: its YAML file, the folder it writes, and what wins over the file."""

    name: str
    config: Path
    output: Path
    overrides: tuple[str, ...]


def quickstart() -> ModuleType:
    """Return launch/quickstart.py, which knows where the teacher comes from."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "launch" / "quickstart.py")
    if spec is None or spec.loader is None:
        raise ImportError("launch/quickstart.py cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fetch_teacher() -> Path:
    program, folder = quickstart(), ROOT / "runs/quickstart-teacher"
    if not program.is_intact(folder):
        program.fetch_teacher(folder, ROOT / program.REQUIREMENT)
    return folder


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    return path


def device() -> str:
    """Return `cuda` if the variable `DS_ACCELERATOR` asks for it, else `cpu`."""
    return "cuda" if os.environ.get("DS_ACCELERATOR") == "cuda" else "cpu"


def variables() -> dict[str, str]:
    """Return the variables of runs and ranks, which see GPUs only if they are asked for."""
    fixed: dict[str, str] = quickstart().ENVIRONMENT
    if device() == "cuda":
        hiding = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
        fixed = {key: value for key, value in fixed.items() if key not in hiding}
    return os.environ | fixed


def launch_command(program: str, config: Path, ranks: int, overrides: Sequence[str]) -> list[str]:
    script = [f"launch/{program}.py", "--config", str(config), *overrides]
    if ranks == 1:
        return [sys.executable, "-u", *script]
    return under_launcher(script, ranks, on_cpu=True)


def under_launcher(script: Sequence[str], ranks: int, *, on_cpu: bool) -> list[str]:
    """Return the command that runs a script on ranks of this machine, on a free port."""
    from megakd.engine.distributed import free_port  # takes seconds

    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    places = ["--num_gpus", str(ranks), "--master_port", str(free_port())]
    if on_cpu:
        # The launcher shows GPUs to its ranks, also to those on the CPU: hide them again.
        hidden = ["--no_python", "--no_local_rank", "env", "CUDA_VISIBLE_DEVICES="]
        script = [*hidden, sys.executable, "-u", *script]
    return [*launcher, *places, *script]


def bench_path() -> str:
    """Return PYTHONPATH with the folder of `bench`, which is no installed package."""
    paths = [str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


def start_ranks(
    words: Sequence[str],
    ranks: int,
    *,
    environment: Mapping[str, str] | None = None,
    is_quiet: bool = False,
) -> None:
    """Run Python once per rank, with the cores shared among them."""
    from megakd.engine.distributed import free_port  # takes seconds

    threads = max(1, (os.cpu_count() or 1) // ranks)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": threads}
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
        of_rank = {key: str(value) for key, value in {**place, **meeting}.items()}
        of_rank = {**variables(), **of_rank, **(environment or {})}
        output = subprocess.DEVNULL if is_quiet else None
        processes.append(subprocess.Popen([sys.executable, *words], env=of_rank, stdout=output))
    try:
        code = _worst_code(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if code:
        raise RunFailedError(f"a rank ended with exit code {code}")


def _worst_code(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [abs(code) for code in codes if code]
        if failed or None not in codes:
            return max(failed, default=0)
        time.sleep(0.1)


def report_of(leg: Leg, *, ranks: int, jobs: int = 1) -> dict[str, Any]:
    """Return the report of a leg, one of `jobs` side by side, which is run unless it is done."""
    report = finished(leg)
    if report is not None:
        return report
    print(f"{leg.output}:", flush=True)
    overrides = [*leg.overrides, f"output_dir={leg.output}"]
    command = launch_command("train", leg.config, ranks, overrides)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (ranks * jobs)))}
    code = subprocess.run(command, cwd=ROOT, env=variables() | threads, check=False).returncode
    written = ROOT / leg.output / "report.json"
    # The launcher also returns 0 when a rank was killed by a signal.
    if code != 0 or not written.is_file():
        raise RunFailedError(f"{leg.config}: exit code {code}, and {written} does not exist")
    return read_report(written.parent)


def write_leg_configs(out: Path, trees: Mapping[str, Any]) -> None:
    """Write the configs that legs of a folder override, by name."""
    for name, tree in trees.items():
        write_config(out / "configs" / f"{name}.yaml", {"output_dir": str(out / name), **tree})


def leg_of(out: Path, name: str, config: str, overrides: Iterable[str]) -> Leg:
    return Leg(name, out / "configs" / f"{config}.yaml", out / name, tuple(overrides))


def run_side_by_side(some: Iterable[Leg], *, jobs: int) -> None:
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda leg: report_of(leg, ranks=1, jobs=jobs), some))


def reports_of(some: Iterable[Leg]) -> dict[str, dict[str, Any] | None]:
    """Return the reports of legs by name, and print which legs have not finished."""
    reports = {leg.name: finished(leg) for leg in some}
    for name, report in reports.items():
        if report is None:
            print(f"{name} has not finished", flush=True)
    return reports


def finished(leg: Leg) -> dict[str, Any] | None:
    """Return the report of a leg; None if it has not finished.

    Raises:
        UnusableError: the folder holds a run of another config.
    """
    output = ROOT / leg.output
    if not (output / "report.json").is_file():
        return None
    asked = load_config(leg.config, [*leg.overrides, f"output_dir={leg.output}"])
    differing = differences(
        flatten(config_tree(load_config(output / "config.yaml"))), flatten(config_tree(asked))
    )
    if differing:
        raise UnusableError(f"{output} holds a run of another config ({differing}); remove it")
    return read_report(output)


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def records_of(folder: Path) -> list[dict[str, Any]]:
    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return [json.loads(line) for line in lines]


def stage_of(report: Report, name: str) -> Report:
    return next(stage for stage in report["stages"] if stage["name"] == name)


def seconds_of(report: Report) -> dict[str, float]:
    """Return the seconds of training by stage, evaluations and saves included."""
    return {stage["name"]: stage["seconds"] for stage in report["stages"]}
