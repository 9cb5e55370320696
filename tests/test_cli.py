"""The command line: what each word leads to, and what mistakes are answered with."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
from run_files import RUN

import megakd.run
from megakd import cli
from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.errors import MegakdError, ModelError
from megakd.run.holder import LOCK, locked


class Runs(types.ModuleType):
    """A stand-in of the modules that do the work of commands, which notes its arguments."""

    def __init__(self) -> None:
        super().__init__("megakd.run.main")
        self.asked: list[tuple[object, ...]] = []
        self.failure: MegakdError | None = None

    def run(self, config: RunConfig, *, command: str) -> str:
        if self.failure:
            raise self.failure
        self.asked.append(("run", config.train.max_steps, command))
        return "the result table"

    def evaluate_model(
        self, config: RunConfig, model: str | None, *, data: str | None
    ) -> dict[str, Any]:
        self.asked.append(("evaluate", config.task.dataset, model, data))
        result = {"file": "reviews", "split": "test", "rows": 7, "metrics": {"accuracy": 0.5}}
        return {"model": "final", **result, "standard_errors": {}, "evaluation_sets": {}}

    def export_run(
        self, config: RunConfig, stage: str | None, to: Path, *, add: object = None
    ) -> Path:
        assert add is None
        self.asked.append(("export", config.output_dir, stage, to))
        return to


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    fake = Runs()
    monkeypatch.setitem(sys.modules, "megakd.commands.scored_models", fake)
    for name in ("main", "finished_run"):
        monkeypatch.setitem(sys.modules, f"megakd.run.{name}", fake)
        monkeypatch.setattr(megakd.run, name, fake, raising=False)
    for name in ("evaluate.scored_model", "export.exported_stage"):
        monkeypatch.setattr(f"megakd.commands.{name}", lambda *_: None)
    return fake


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)


@pytest.fixture
def run_file(run_file: Path) -> str:
    return str(run_file)


def test_training_gets_the_config_with_overrides_and_the_command(run_file, runs, capsys) -> None:
    code = cli.train_main(["--local_rank=1", "--config", run_file, "train.max_steps=3"])
    assert capsys.readouterr().out == "the result table\n"

    command = f"launch/train.py --config {run_file} train.max_steps=3"
    assert (code, runs.asked) == (0, [("run", 3, command)])


def test_overrides_may_stand_on_both_sides_of_an_option(run_file, runs, capsys, tmp_path):
    words = ["train.max_steps=3", "--config", run_file, "--print-config", "seed=7"]

    assert cli.train_main(words) == 0
    assert runs.asked == []

    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(printed) == load_config(Path(run_file), ["train.max_steps=3", "seed=7"])


@pytest.mark.parametrize(
    ("word", "variable"),
    [
        *(("--print-config", variable) for variable in ("RANK", "SLURM_PROCID")),
        # On every node, because another node may lack a file.
        *(("train.lr=1", variable) for variable in ("LOCAL_RANK", "SLURM_LOCALID")),
    ],
)
def test_only_rank_0_writes_and_the_first_rank_of_a_node_its_errors(
    word, variable, run_file, monkeypatch, capfd
):
    written = []
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        cli.train_main(["--config", run_file, word])
        written.append("".join(capfd.readouterr()))

    assert written[0]
    assert not written[1]


def without(libraries: str, folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with `run.yaml`; the exit code is 9 if it loads the libraries."""
    program = (
        "import sys; from megakd.cli import main; code = main(sys.argv[1:]); "
        f"sys.exit(9 if {{*'{libraries}'.split()}} & {{*sys.modules}} else code)"
    )
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train run.yaml task.dataset=rows.csv student.model=/nowhere/student",
            "3 problems\n"
            "  task.dataset: rows.csv does not exist\n"
            "  teacher.model: nowhere/teacher does not exist\n"
            "  student.model: /nowhere/student does not exist\n",
        ),
        ("shrink ./nowhere --data=run.yaml --flops=1%", "teacher.model: nowhere does"),
        ("shrink encoder --data=run.yaml --flops=1% seed=x", 'override "seed=x": seed'),
        ("evaluate run.yaml", "runs/x/final does not exist; train first, or give --model"),
        ("evaluate run.yaml --model=. --data=no.csv", "--data: no.csv does not exist\n"),
        ("export run.yaml --to=copy", "runs/x holds no finished run to export; finish"),
        ("export run.yaml --to=copy --stage=a", 'runs/x has no stage "a"; finished'),
    ],
)
def test_what_is_missing_is_named_before_torch_is_loaded(tmp_path, words, message):
    (tmp_path / "run.yaml").write_text(RUN.replace("model: teacher", "model: ./nowhere/teacher"))
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text('{"architectures": ["BertModel"]}')

    ended = without("torch", tmp_path, words.split())

    assert ended.stderr.startswith(f"megakd: error: {message}")
    assert (ended.returncode, ended.stdout) == (2, "")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--help", 0, ""),
        ("train run.yaml train.steps=3", 2, "unknown key"),
        (
            "train run.yaml task.dataset=rows.csv",
            2,
            f"megakd: error: out is in use by another run: process {os.getpid()} on ",
        ),
    ],
    ids=["help", "a key that does not exist", "a folder in use"],
)
def test_help_and_what_is_refused_load_no_heavy_library(tmp_path, words, code, message):
    (tmp_path / "run.yaml").write_text(RUN.replace("runs/x", "out"))
    (tmp_path / "rows.csv").touch()

    with locked(tmp_path / "out"):
        ended = without("torch deepspeed transformers datasets", tmp_path, words.split())
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]

    assert message in ended.stderr
    assert ended.returncode == code, ended.stderr


def test_python_runs_the_package_as_the_command() -> None:
    command = [sys.executable, "-m", "megakd", "--version"]

    assert re.fullmatch(r"megakd \d+\.\d+\S*\n", subprocess.check_output(command, text=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "--config is missing; give the run's YAML file: launch/train.py --config F"),
        ("train.max_steps=1", "--config is missing"),
        ("--config", "argument --config: expected one argument"),
        ("--config nowhere.yaml", "config file nowhere.yaml cannot be read (No such file"),
        ("--learning_rate 3e-4", "unknown option --learning_rate; settings are written train.l"),
        ("--max-steps=3", "unknown option --max-steps=3; settings are written train.max_steps="),
        ("--print_config", 'unknown option --print_config; did you mean "--print-config"?'),
        ("--conf x", 'unknown option --conf; did you mean "--config"?'),
        ("--zzz", "unknown option --zzz (launch/train.py --help lists the options)"),
    ],
)
def test_a_wrong_command_line_gets_one_line(words, message, capsys):
    code = cli.train_main(words.split())

    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith(f"megakd: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (ModelError("teacher has no head"), "teacher has no head\n"),
        (PermissionError(13, "Permission denied", "/locked/out"), "/locked/out: permission denied"),
    ],
)
def test_a_failure_is_one_line_without_traceback_of_the_rank_that_met_it(
    run_file, runs, monkeypatch, capsys, failure, told
):
    if isinstance(failure, PermissionError):
        monkeypatch.setenv("RANK", "1")
    runs.failure = failure

    assert cli.train_main(["--config", run_file]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"megakd: error: {told}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["train", "evaluate", "export", "report"])
def test_a_path_that_is_too_long_for_the_file_system_is_one_line(command, capsys):
    assert cli.main([command, "a" * 300]) == 2

    error = capsys.readouterr().err
    assert "file name too long; give a shorter one" in error
    assert error.count("\n") == 1


def test_a_bug_keeps_its_traceback(run_file, monkeypatch, runs):
    monkeypatch.setattr(runs, "run", None)

    with pytest.raises(TypeError):
        cli.train_main(["--config", run_file])


def test_a_command_takes_the_config_as_option_or_first_word(run_file, runs):
    for config in (["--config", run_file], [run_file]):
        assert cli.main(["train", *config, "train.max_steps=3"]) == 0
    assert [asked[:2] for asked in runs.asked] == [("run", 3)] * 2


def test_another_data_set_that_is_no_file_is_the_runs(run_file: str, runs: Runs) -> None:
    assert cli.main(["evaluate", run_file, "task.dataset=glue/rte"]) == 0

    assert runs.asked == [("evaluate", "glue/rte", None, None)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export", "--to is missing; give the folder"),
        ("evalute", 'unknown command "evalute"; did you mean "evaluate"?'),
        ("train --print-config --dry-run", "--dry-run: not allowed with argument --print-config"),
    ],
)
def test_a_command_that_cannot_be_is_refused_and_prints_nothing(words, message, run_file, capsys):
    command, *options = words.split()
    assert cli.main([command, run_file, *options]) == 2

    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_torch_below_the_supported_one_is_refused(run_file, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli, "version", {"torch": "2.10.1+cu128"}.__getitem__)

    assert cli.main(["plan", run_file]) == 2
    assert "torch 2.10.1+cu128 is installed; megakd needs 2.11 or newer" in capsys.readouterr().err
    (needed,) = (line for line in requires("megakd") or () if line.startswith("torch"))
    assert f">={cli._LEAST_TORCH}" in needed


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0)], ids=["nothing", "help"])
def test_the_commands_are_listed(words, code, capsys):
    assert cli.main(words) == code
    usage = capsys.readouterr().out.splitlines()[0]
    commands = "train,plan,cache,encode,answer,evaluate,shrink,export,report,methods"
    assert usage == f"usage: megakd {{{commands}}} ..."


LAUNCH = Path(__file__).resolve().parents[1] / "launch" / "train.py"


def test_the_launch_file_says_when_megakd_is_not_installed(tmp_path: Path) -> None:
    # -I leaves out PYTHONPATH, -S the site-packages that may hold megakd.
    command = [sys.executable, "-I", "-S", str(LAUNCH)]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 1
    assert done.stderr.startswith("megakd is not installed in this Python: run `make install`")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", ["methods", "--help"])
def test_a_reader_that_ends_early_ends_the_command_quietly(words: str) -> None:
    code = "import sys; from megakd import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words.split()]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()

    assert (process.returncode, errors) == (0, b"")


@pytest.mark.parametrize("config", ["--config=~/run.yaml", "~/run.yaml"])
def test_paths_in_the_home_folder_are_found(config, run_file, runs, monkeypatch):
    home = Path(run_file).parent
    monkeypatch.setenv("HOME", str(home))

    assert cli.main(["export", config, "--to", ""]) == 2
    assert cli.main(["export", config, "--to=$NOWHERE/made"]) == 2
    for folder in ("~/made", "$HOME/made"):
        assert cli.main(["export", config, f"--to={folder}"]) == 0
    assert runs.asked == [("export", Path("runs/x"), None, home / "made")] * 2


@pytest.mark.parametrize(
    ("words", "name", "answer"),
    [
        (["evaluate"], "evaluate_model", "reviews, test: 7 rows\n"),
        (["export", "--to=made"], "export_run", "made\n"),
    ],
)
def test_only_the_answer_of_a_command_reaches_standard_output(
    words, name, answer, run_file, runs, capfd, monkeypatch
):
    quiet = getattr(runs, name)

    def noisy(*facts: Any, **how: Any) -> Any:
        os.write(1, b"[INFO] a library says hello\n")
        return quiet(*facts, **how)

    monkeypatch.setattr(runs, name, noisy)

    assert cli.main([words[0], run_file, *words[1:]]) == 0

    shown = capfd.readouterr()
    assert "hello" in shown.err
    assert "hello" not in shown.out
    assert shown.out.startswith(answer)
