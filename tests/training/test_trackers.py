"""What the services of `log.report_to` are told, through stand-ins of their published APIs."""

from __future__ import annotations

import errno
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tiny_runs import config_tree, write_config, write_reviews

from megakd.errors import ConfigError
from megakd.training.progress import Extent, Reporter
from megakd.training.trackers import TensorBoard, check_trackers, make_trackers


class Service(ModuleType):
    """A library that records what it is asked to do."""

    def __init__(self, name):
        super().__init__(name)
        self.runs = {}
        self.finished = []
        self.started = []


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
            log=lambda values, step: self.runs[key].append((step, values)),
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


def entity(key, value, timestamp, step):
    return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)


@pytest.fixture(params=["wandb", "mlflow"])
def service(request, monkeypatch):
    made = {"wandb": Wandb, "mlflow": Mlflow}[request.param](request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    entities: Any = SimpleNamespace(Metric=entity)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return made


def run_of(folder, service, stage, steps, *, seed=1):
    folder.mkdir(exist_ok=True)
    trackers = make_trackers([service.__name__], folder, {"seed": seed})
    reporter = Reporter(folder, is_main=True, trackers=trackers)
    reporter.begin(stage, Extent(step=steps.start - 1, total_steps=9, steps_per_epoch=3))
    for step in steps:
        reporter.log(step, {"train/loss": 1 / step}, stage=stage)
    reporter.close()


def test_every_stage_is_a_run_and_a_resumed_stage_goes_on_with_its_own(service, tmp_path):
    out = tmp_path / "out"

    for stage, steps in {"teacher": (1, 3), "student": (1, 3)}.items():
        run_of(out, service, stage, range(*steps))
    run_of(out, service, "student", range(3, 5))

    assert list(service.runs) == ["run0", "run1"]
    assert service.runs["run0"] == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})]
    assert [step for step, _ in service.runs["run1"]] == [1, 2, 3, 4]
    assert set(service.finished) == {"run0", "run1"}
    assert service.started[0][-2] == "out/teacher"
    run_of(out, service, "student", range(1, 3))  # the stage starts over
    assert len(service.runs["run2"]) == 2


@pytest.mark.parametrize("service", ["mlflow"], indirect=True)
def test_a_server_that_goes_away_is_said_once_and_does_not_stop_a_run(service, tmp_path, caplog):
    service.down = True

    run_of(tmp_path / "out", service, "student", range(1, 4))

    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("mlflow does not respond (no answer): no further values")
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_that_is_not_installed_is_named_with_its_package(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)

    with pytest.raises(ConfigError, match=rf"log\.report_to: {name} .*pip install {name}"):
        check_trackers(["tensorboard", name])


def test_a_run_without_the_library_ends_before_its_data_are_read(one_rank, tmp_path):
    task = {"type": "classification", "dataset": str(write_reviews(tmp_path / "reviews"))}
    tree = config_tree(tmp_path / "out", task, log={"report_to": ["wandb"]})

    said = one_rank.train("--config", write_config(tmp_path / "run.yaml", tree))

    assert said.code == 2
    assert "pip install wandb" in said.err
    assert not (tmp_path / "out").exists()


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


def test_a_file_in_the_place_of_the_curves_does_not_stop_a_run(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("")
    board = TensorBoard(tmp_path)

    board.begin("student", 0)
    board.log("student", 1, {"train/loss": 1.0})
    board.close()

    assert caplog.text.count("no further values of this run are written to TensorBoard") == 1
