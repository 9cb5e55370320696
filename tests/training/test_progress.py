"""What is logged while training, what services are told, and what a resumed run forgets."""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import run_in
from transformers import BertConfig

from megakd.config.sections import LoraConfig
from megakd.errors import MegakdError
from megakd.models.fitting import ModelSource
from megakd.models.structure import architecture_of
from megakd.training.log import Reporter
from megakd.training.stage_run import StageRun
from megakd.training.trackers import Trackers

NUMBERS = {"train/loss": 0.12345678, "train/learning_rate": 3e-4, "train/tokens_per_s": 12345.6}
NUMBERS |= {"train/memory_bytes": 2.5e9, "train/gradient_norm": 7.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder: Path, stage: str) -> list[int]:
    return [record["step"] for record in records(folder) if record["stage"] == stage]


OF_TEN = {"last": 10, "steps_per_epoch": 4}


def run_of(folder: Path, stage: str, steps: range, trackers: Trackers | None = None) -> None:
    reporter = Reporter(folder, is_main=True, trackers=trackers)
    reporter.begin(stage, steps.start - 1, **OF_TEN)
    for step in steps:
        reporter.log(step, {"train/loss": 1 / step})
    reporter.close()


def curve_of(folder: Path, stage: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard" / stage)).Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars("train/loss")]


def test_a_resumed_run_forgets_later_lines_and_curves_of_its_stage_only(tmp_path):
    tracked(tmp_path, "teacher", range(1, 6), "tensorboard")
    tracked(tmp_path, "distil", range(1, 6), "tensorboard")

    tracked(tmp_path, "distil", range(4, 7), "tensorboard")

    assert steps_of(tmp_path, "distil") == [1, 2, 3, 4, 5, 6]
    assert steps_of(tmp_path, "teacher") == [1, 2, 3, 4, 5]
    # Every line says how many passes over the rows are done.
    passes = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    assert [r["epoch"] for r in records(tmp_path) if r["stage"] == "distil"] == passes
    curve = [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25), (5, 0.2), (6, 0.1667)]
    assert curve_of(tmp_path, "distil") == curve
    run_of(tmp_path, "distil", range(1, 2))  # the stage starts over
    assert steps_of(tmp_path, "distil") == [1]


@pytest.mark.parametrize(
    "lines", ['{}{{"stage": "distil", "st', '{{"sta\n{}'], ids=["last", "first"]
)
def test_a_resumed_run_drops_a_damaged_line(tmp_path, lines):
    first = '{"stage": "distil", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(lines.format(first))

    run_of(tmp_path, "distil", range(2, 3))

    assert steps_of(tmp_path, "distil") == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize("is_main", [True, False])
def test_a_terminal_gets_a_bar_with_the_chosen_numbers_from_rank_0_alone(
    tmp_path, monkeypatch, is_main
):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    reporter = Reporter(tmp_path, is_main=is_main)

    reporter.begin("distil", 2, **OF_TEN)
    reporter.advance(3)
    reporter.log(4, NUMBERS)
    reporter.close()

    shown, files = terminal.getvalue(), [path.name for path in tmp_path.iterdir()]
    assert files == (["metrics.jsonl"] if is_main else [])
    for text in ("distil", "4/10", "loss=0.1235, lr=0.0003, tok/s=12,346, mem=2.5GB"):
        assert (text in shown) is is_main
    assert "gradient_norm" not in shown
    assert is_main or shown == ""


def test_without_a_terminal_there_is_one_short_line_per_log_and_no_bar(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("megakd.training.meter.time.perf_counter", lambda: clock.now)
    reporter = Reporter(tmp_path, is_main=True)
    reporter.begin("distil", 4, **OF_TEN)
    clock.now += 2400
    with caplog.at_level(logging.INFO):
        reporter.log(6, NUMBERS)
        reporter.log(6, {"eval/half/accuracy": 0.5, "eval/accuracy": 0.75})
    reporter.log(7, {"x": float("nan")})

    assert stream.getvalue() == ""
    assert caplog.messages == [
        "distil 6/10  epoch 1.50  loss 0.1235  lr 0.0003  tok/s 12,346  ETA 1:20:00  mem 2.5GB",
        "distil 6/10  epoch 1.50  eval/accuracy 0.75",
    ]
    # Lines are on the disk at once.
    first, _, last = records(tmp_path)
    assert NUMBERS.items() <= first.items()
    assert (last["step"], last["x"]) == (7, None)
    reporter.close()


def test_a_disk_that_is_full_midway_is_said_once_and_not_again_when_the_file_is_closed(
    tmp_path, monkeypatch
):
    class Full(io.FileIO):
        def write(self, content: object) -> int:
            return super().write(bytes(content)[:5])  # type: ignore[call-overload]

    reporter = Reporter(tmp_path, is_main=True)
    reporter.begin("distil", 0, **OF_TEN)
    reporter.log(1, {"train/loss": 1.0})
    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda path, *_, **__: Full(path, "a"))
        with pytest.raises(MegakdError, match=r"no space left while writing .*metrics\.jsonl"):
            reporter.log(2, {"train/loss": 0.5})
    reporter.close()

    run_of(tmp_path, "distil", range(2, 3))
    assert steps_of(tmp_path, "distil") == [1, 2]


def test_a_folder_in_the_place_of_the_log_or_a_missing_library_ends_a_run_before_its_data_are_read(
    one_rank, tmp_path
):
    log, task = tmp_path / "out/metrics.jsonl", {"type": "classification", "dataset": "no/thing"}
    log.mkdir(parents=True)

    outcome = one_rank.train("--config", run_in(tmp_path, task), code=2)

    assert f"megakd: error: {log} cannot be used (Is a directory)" in outcome.err
    assert [*log.parent.iterdir()] == [log]
    other = run_in(tmp_path / "other", task, log={"report_to": ["mlflow"]})
    outcome = one_rank.train("--config", other, code=2)
    assert "log.report_to: mlflow" in outcome.err
    assert "pip install mlflow" in outcome.err
    assert not (tmp_path / "other" / "out").exists()


class Service(GeneralTracker):
    """A service that keeps its runs, as accelerate's tracker of wandb starts them."""

    name = "wandb"
    requires_logging_directory = False
    runs: dict[str, list[tuple[int, Any]]]
    configs: list[Any]
    is_down = False

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options = project, options

    def start(self) -> None:
        assert (self.project, self.options["group"]) == ("megakd", "out")
        self.log_of_run = self.runs.setdefault(self.options["id"], [])

    def store_init_configuration(self, values: dict) -> None:
        self.configs.append(values)

    def log(self, values: dict, step: int | None, **_: Any) -> None:
        if self.is_down:
            raise ConnectionError("no answer")
        self.log_of_run.append((step, values))

    def finish(self) -> None:
        self.log_of_run = None


@pytest.fixture
def service(monkeypatch):
    fresh = type("Fresh", (Service,), {"runs": {}, "configs": []})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", fresh)
    return fresh


def tracked(folder, stage, steps, *names):
    folder.mkdir(exist_ok=True)
    run_of(folder, stage, steps, Trackers(names or ["wandb"], folder, {"seed": 1}))


def test_every_stage_is_a_run_and_a_resumed_stage_goes_on_with_its_own(service, tmp_path):
    out = tmp_path / "out"

    for stage, steps in {"teacher": (1, 3), "student": (1, 3)}.items():
        tracked(out, stage, range(*steps))
    tracked(out, "student", range(3, 5))

    teacher, student = service.runs.values()
    assert teacher == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})]
    assert [step for step, _ in student] == [1, 2, 3, 4]
    assert service.configs == [{"seed": "1"}] * 2
    tracked(out, "student", range(1, 3))  # the stage starts over
    assert len(service.runs) == 3


def test_a_service_that_fails_is_said_once_and_stops_neither_a_run_nor_other_services(
    service, tmp_path, caplog
):
    service.is_down = True

    tracked(tmp_path / "out", "student", range(1, 4), "wandb", "tensorboard")

    (message,) = caplog.messages
    assert message.startswith("log.report_to: wandb failed (no answer): no further values")
    assert len(records(tmp_path / "out")) == 3
    assert [step for step, _ in curve_of(tmp_path / "out", "student")] == [1, 2, 3]


def test_curves_that_cannot_be_written_are_said_once_and_do_not_stop_a_run(tmp_path, caplog):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    board = Trackers(["tensorboard"], tmp_path, {})
    board.begin("student", 0)
    board.log(1, {"train/loss": 1.0})
    writer = board._running["tensorboard"].writer.file_writer.event_writer
    events = writer._async_writer._writer
    events.flush = full

    for step in (2, 3):
        board.log(step, {"train/loss": 0.5})
    board.close()

    (message,) = caplog.messages
    assert "tensorboard failed ([Errno 28] No space left on device)" in message
    events.close()


@pytest.mark.parametrize(
    ("rate", "lora", "ending"),
    [
        (0.1, None, "; dropout draws other numbers from here on"),
        (0.0, None, ""),
        (0.0, LoraConfig(), ""),
        (0.0, LoraConfig(dropout=0.1), "; dropout draws other numbers from here on"),
    ],
)
def test_a_resume_on_other_ranks_speaks_of_dropout_where_there_is_some(
    rate, lora, ending, tmp_path, caplog
):
    config = BertConfig(hidden_dropout_prob=rate, attention_probs_dropout_prob=0.0)
    source = ModelSource(
        name="m", folder=None, config=config, architecture=architecture_of(config), where="student"
    )
    run = SimpleNamespace(
        stage=SimpleNamespace(name="student", role="student"),
        first_step=0,
        ranks=SimpleNamespace(rank=0, world_size=2),
        saves=SimpleNamespace(load=lambda *_: (3, False)),
        student=SimpleNamespace(load=None),
        _states={},
        trainer=SimpleNamespace(step=4),
        config=SimpleNamespace(seed=1, student=SimpleNamespace(lora=lora)),
        learner_sources={"student": source},
    )

    with caplog.at_level(logging.INFO, logger="megakd"):
        assert StageRun.resume(cast("Any", run), tmp_path) == 4

    text = f"student: resumed at step 4 from {tmp_path}, which 3 ranks wrote, and 2 go on{ending}"
    assert text in caplog.messages
