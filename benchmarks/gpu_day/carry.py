"""`gpu_day.py` on a machine without a network whose commands may last only minutes.

`python3 benchmarks/gpu_day/carry.py --wheels .whl --to FOLDER [options of gpu_day.py]`, in the root
of the checkout. The first call installs the wheels of `pack.py` beside the machine's torch, checks
versions and products, and starts `gpu_day.py` in the background. Every call waits at most `--wait`
seconds and copies the results so far to FOLDER; the same command again goes on. It needs nothing
but Python's library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

MODULES = ("numpy", "transformers", "datasets", "deepspeed", "pytest", "megakd.run.main")
CHECK = """
import importlib, sys, torch
on_gpu = torch.cuda.is_available()
print("torch", torch.__version__, "on", torch.cuda.get_device_name(0) if on_gpu else "the CPU")
for name in sys.argv[1:]:
    print(name, getattr(importlib.import_module(name), "__version__", ""))
if on_gpu:
    ones = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(256, 256, device="cuda")
    torch.mm(ones, ones, out_dtype=torch.float32, out=out)
    torch.addmm(out, ones.T, ones, out_dtype=torch.float32, out=out)
    assert out.eq(512).all(), "products with fp32 results are wrong"
"""
# No name of this machine needs to be resolved.
LOCAL = {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
EVERY_S = 0.5
WORK = Path(tempfile.gettempdir()) / "megakd-gpu-day"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, help="the folder of pack.py; none: all is installed")
    parser.add_argument("--to", type=Path, required=True, help="for the results of every call")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--wait", type=float, default=560, help="seconds of a call, all in all")
    given, options = parser.parse_known_args()
    end = time.monotonic() + given.wait
    given.work.mkdir(parents=True, exist_ok=True)
    if not (given.work / "pid").is_file():
        if not prepare(given):
            return 2
        start(given, options)
    while is_running(given.work) and time.monotonic() < end:
        time.sleep(EVERY_S)
    bring(given)
    print("still running: the same command again" if is_running(given.work) else "finished")
    return 0


def prepare(given: argparse.Namespace) -> bool:
    """Install the wheels, copy the checkout, which a call may take away, and check both."""
    if given.wheels is not None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        wheels = map(str, sorted(given.wheels.glob("*.whl")))
        site = given.work / "site"
        subprocess.run([*pip, "--upgrade", "--target", str(site), *wheels], check=True)
    ignored = shutil.ignore_patterns(".git", ".venv*", ".whl", ".cache", "runs", "__pycache__")
    shutil.copytree(Path.cwd(), given.work / "checkout", ignore=ignored, dirs_exist_ok=True)
    check = [sys.executable, "-c", CHECK, *MODULES]
    done = subprocess.run(check, env=variables(given), capture_output=True, text=True, check=False)
    (given.work / "check.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    print(done.stdout + done.stderr[-2000:], flush=True)
    return done.returncode == 0


def variables(given: argparse.Namespace) -> dict[str, str]:
    return {**os.environ, **LOCAL, "PYTHONPATH": str(given.work / "site")}


def start(given: argparse.Namespace, options: list[str]) -> None:
    """Start the parts in a session of their own, which outlives this call."""
    command = [sys.executable, "-u", "benchmarks/gpu_day.py", "--out", str(given.work / "day")]
    with (given.work / "day.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options], cwd=given.work / "checkout", env=variables(given), stdout=log,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    (given.work / "pid").write_text(str(process.pid), encoding="utf-8")


def is_running(work: Path) -> bool:
    status = Path("/proc") / (work / "pid").read_text(encoding="utf-8") / "stat"
    # A process that nobody waits for stays as a zombie.
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def bring(given: argparse.Namespace) -> None:
    given.to.mkdir(parents=True, exist_ok=True)
    day = given.work / "day"
    kept = (day / "results.json", day / "page.md", day / "work/llama/trace.json.gz")
    for file in (*kept, given.work / "check.txt", given.work / "day.log"):
        if file.is_file():
            shutil.copy(file, given.to)
    if (day / "logs").is_dir():
        with tarfile.open(given.to / "logs.tgz", "w:gz") as logs:
            logs.add(day / "logs", arcname="logs")
    if (day / "results.json").is_file():
        parts = json.loads((day / "results.json").read_text(encoding="utf-8"))["parts"]
        for name, part in parts.items():
            print(f"{name}: {part['state']} after {part['seconds']} s {part['reason']}".rstrip())


if __name__ == "__main__":
    sys.exit(main())
