"""What is logged while training, what services are told, and what a resumed run forgets."""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import run_in

from megakd.errors import MegakdError
from megakd.training.progress import Extent, Reporter
from megakd.training.trackers import TensorBoard, make_trackers

NUMBERS = {
    "train/loss": 0.12345678,
    "train/hard_cross_entropy": 0.2,
    "train/learning_rate": 3e-4,
    "train/tokens_per_s": 12345.6,
    "train/memory_bytes": 2.5e9,
    "train/gradient_norm": 7.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path, stage: str) -> list[int]:
    return [record["step"] for record in records(folder) if record["stage"] == stage]


def of_ten(step: int) -> Extent:
    return Extent(step=step, total_steps=10, steps_per_epoch=4)


def run_of(folder: Path, stage: str, steps: range, *trackers: Any) -> None:
    reporter = Reporter(folder, is_main=True, trackers=trackers)
    reporter.begin(stage, of_ten(steps.start - 1))
    for step in steps:
        reporter.log(step, {"train/loss": 1 / step}, stage=stage)
    reporter.close()


def test_each_log_is_one_json_line_on_the_disk_at_once(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, is_main=True)

    reporter.log(3, {"train/loss": 0.5, "eval/accuracy": 1, "x": float("nan")}, stage="distil")

    (record,) = records(tmp_path)
    assert (record["stage"], record["step"]) == ("distil", 3)
    assert (record["train/loss"], record["eval/accuracy"], record["x"]) == (0.5, 1.0, None)
    reporter.close()


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    reporter = Reporter(tmp_path, is_main=False)

    reporter.begin("distil", of_ten(0))
    reporter.advance(1)
    reporter.log(1, {"train/loss": 0.5}, stage="distil")
    reporter.close()

    assert list(tmp_path.iterdir()) == []
    assert terminal.getvalue() == ""


def test_a_resumed_run_forgets_later_lines_of_its_stage_only(tmp_path: Path) -> None:
    run_of(tmp_path, "teacher", range(1, 6))
    run_of(tmp_path, "distil", range(1, 6))

    run_of(tmp_path, "distil", range(4, 7))

    assert steps_of(tmp_path, "distil") == [1, 2, 3, 4, 5, 6]
    assert steps_of(tmp_path, "teacher") == [1, 2, 3, 4, 5]
    # Every line says how many passes over the rows are done.
    passes = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    assert [r["epoch"] for r in records(tmp_path) if r["stage"] == "distil"] == passes
    run_of(tmp_path, "distil", range(1, 2))  # the stage starts over
    assert steps_of(tmp_path, "distil") == [1]
    assert not (tmp_path / "tensorboard").exists()


FIRST = '{"stage": "distil", "step": 1}\n'


@pytest.mark.parametrize(
    ("lines", "resumes"),
    [(f'{FIRST}{{"stage": "distil", "st', False), (f'{{"sta\n{FIRST}', True)],
    ids=["last", "first"],
)
def test_a_damaged_line_is_dropped(tmp_path: Path, lines: str, *, resumes: bool) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    reporter = Reporter(tmp_path, is_main=True)
    if resumes:
        reporter.begin("distil", of_ten(1))

    reporter.log(2, {}, stage="distil")
    reporter.close()

    assert steps_of(tmp_path, "distil") == [1, 2]


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path: Path) -> None:
    run_of(tmp_path, "distil", range(1, 6), TensorBoard(tmp_path))
    run_of(tmp_path, "distil", range(4, 7), TensorBoard(tmp_path))

    events = EventAccumulator(str(tmp_path / "tensorboard" / "distil")).Reload()

    curve = [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")]
    assert curve == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25), (5, 0.2), (6, 0.1667)]


def test_a_terminal_gets_a_bar_with_the_chosen_numbers(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    reporter = Reporter(tmp_path, is_main=True)

    reporter.begin("distil", of_ten(2))
    reporter.advance(3)
    reporter.log(4, NUMBERS, stage="distil")
    reporter.close()

    shown = terminal.getvalue()
    assert "distil" in shown
    assert "4/10" in shown
    assert "loss=0.1235, lr=0.0003, tok/s=12,346, mem=2.5GB" in shown
    assert "gradient_norm" not in shown


def test_without_a_terminal_there_is_one_short_line_per_log_and_no_bar(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("megakd.training.progress.time.perf_counter", lambda: clock.now)
    reporter = Reporter(tmp_path, is_main=True)
    reporter.begin("distil", of_ten(4))
    clock.now += 2400
    with caplog.at_level(logging.INFO):
        reporter.log(6, NUMBERS, stage="distil")
        reporter.log(6, {"eval/half/accuracy": 0.5, "eval/accuracy": 0.75}, stage="distil")
    reporter.close()

    assert stream.getvalue() == ""
    assert [record.getMessage() for record in caplog.records] == [
        "distil 6/10  epoch 1.50  loss 0.1235  lr 0.0003  tok/s 12,346  ETA 1:20:00  mem 2.5GB",
        "distil 6/10  epoch 1.50  eval/accuracy 0.75",
    ]


def test_a_disk_that_is_full_midway_is_said_once_and_not_again_when_the_file_is_closed(tmp_path):
    class Full(io.FileIO):
        def write(self, content: object) -> int:
            return super().write(bytes(content)[:5])  # type: ignore[call-overload]

    reporter = Reporter(tmp_path, is_main=True)
    reporter.log(1, {"train/loss": 1.0}, stage="distil")
    reporter._close_file()
    reporter._file = Full(tmp_path / "metrics.jsonl", "a")

    with pytest.raises(MegakdError, match=r"no space left while writing .*metrics\.jsonl"):
        reporter.log(2, {"train/loss": 0.5}, stage="distil")
    reporter.close()

    run_of(tmp_path, "distil", range(2, 3))
    assert steps_of(tmp_path, "distil") == [1, 2]


def test_a_folder_in_the_place_of_the_log_or_a_missing_library_ends_a_run_before_its_data_are_read(
    one_rank, tmp_path: Path
) -> None:
    (tmp_path / "out" / "metrics.jsonl").mkdir(parents=True)
    task = {"type": "classification", "dataset": "nobody/nothing"}

    outcome = one_rank.train("--config", run_in(tmp_path, task), code=2)

    where = tmp_path / "out" / "metrics.jsonl"
    assert f"megakd: error: {where} cannot be used (Is a directory)" in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]
    for name in ("wandb", "mlflow"):
        other = run_in(tmp_path / name, task, log={"report_to": [name]})
        outcome = one_rank.train("--config", other, code=2)
        assert f"log.report_to: {name}" in outcome.err
        assert f"pip install {name}" in outcome.err
        assert not (tmp_path / name / "out").exists()


class Service(ModuleType):
    """A library that records its calls."""

    def __init__(self, name):
        super().__init__(name)
        self.runs = {}
        self.finished = []
        self.started = []
        self.axes = []


class Wandb(Service):
    """`wandb` as its documentation describes `init`, `Run.log` and `Run.finish`."""

    class Error(Exception):
        pass

    def init(self, *, project, group, name, dir, config, id, resume):  # noqa: A002
        assert (id is None) == (resume is None)
        key = id or f"run{len(self.runs)}"
        self.runs.setdefault(key, [])
        self.started.append((project, group, name, key))
        return SimpleNamespace(
            id=key,
            define_metric=lambda name, step_metric="step": self.axes.append((name, step_metric)),
            log=lambda values: self.runs[key].append((values.pop("step"), values)),
            finish=lambda: self.finished.append(key),
        )


class Mlflow(Service):
    """`mlflow` with the parts of `MlflowClient` that are used."""

    class MlflowException(Exception):  # noqa: N818
        pass

    down = False

    def set_experiment(self, name):
        return SimpleNamespace(experiment_id=name)

    def MlflowClient(self):  # noqa: N802
        return self

    def create_run(self, experiment_id, *, run_name):
        key = f"run{len(self.runs)}"
        self.runs[key] = []
        self.started.append((experiment_id, run_name, key))
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def log_dict(self, run_id, dictionary, artifact_file):
        assert (artifact_file, dictionary) == ("config.json", {"seed": 1})

    def log_batch(self, run_id, *, metrics):
        if self.down:
            raise self.MlflowException("no answer")
        self.runs[run_id].extend((m.step, {m.key: m.value}) for m in metrics)

    def set_terminated(self, run_id):
        self.finished.append(run_id)


@pytest.fixture(params=["wandb", "mlflow"])
def service(request, monkeypatch):
    made = {"wandb": Wandb, "mlflow": Mlflow}[request.param](request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    entities: Any = SimpleNamespace(Metric=namedtuple("Metric", "key value timestamp step"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return made


def tracked(folder, service, stage, steps):
    folder.mkdir(exist_ok=True)
    run_of(folder, stage, steps, *make_trackers([service.__name__], folder, {"seed": 1}))


def test_every_stage_is_a_run_and_a_resumed_stage_goes_on_with_its_own(service, tmp_path):
    out = tmp_path / "out"

    for stage, steps in {"teacher": (1, 3), "student": (1, 3)}.items():
        tracked(out, service, stage, range(*steps))
    tracked(out, service, "student", range(3, 5))

    assert list(service.runs) == ["run0", "run1"]
    assert service.runs["run0"] == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})]
    assert [step for step, _ in service.runs["run1"]] == [1, 2, 3, 4]
    assert set(service.finished) == {"run0", "run1"}
    assert service.started[0][-2] == "out/teacher"
    axes = {("step", "step"), ("*", "step")} if isinstance(service, Wandb) else set()
    assert set(service.axes) == axes
    tracked(out, service, "student", range(1, 3))  # the stage starts over
    assert len(service.runs["run2"]) == 2


@pytest.mark.parametrize("service", ["mlflow"], indirect=True)
def test_a_server_that_goes_away_is_said_once_and_does_not_stop_a_run(service, tmp_path, caplog):
    service.down = True

    tracked(tmp_path / "out", service, "student", range(1, 4))

    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("mlflow does not respond (no answer): no further values")
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


def test_curves_that_cannot_be_written_are_said_once_and_do_not_stop_a_run(tmp_path, caplog):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    board = TensorBoard(tmp_path)
    board.begin("student", 0)
    board.log("student", 1, {"train/loss": 1.0})
    events = board._writers["student"].file_writer.event_writer._async_writer._writer
    events.flush = full

    board.log("student", 2, {"train/loss": 0.5})
    board.log("student", 3, {"train/loss": 0.25})

    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert "metrics.jsonl has all values" in caplog.text
    board.close()
    assert caplog.text.count("cannot be written") == 1
    events.close()
