"""A run that is told to stop, or whose rank dies, goes on to the weights of a whole run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import DEEPSPEED, TIMEOUT_S, TORCHRUN, TRAIN, free_port, start
from tiny_runs import review_task, run_in

pytestmark = pytest.mark.slow
STEPS = 120
FINAL = "final/model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stops")
    return run_in(
        folder,
        review_task(folder),
        student={"deepspeed": "zero2"},
        train={"max_steps": STEPS},
        save={"save_steps": 20},
        log={"logging_steps": 1},
    )


@pytest.fixture(scope="module")
def whole(command, config, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("whole") / "out"
    command("--config", str(config), f"output_dir={out}", code=0)
    return (out / FINAL).read_bytes()


@pytest.fixture
def begin(config, tmp_path) -> Iterator[Callable]:
    """Start a launcher of two ranks; all processes below it end with the test."""
    started: list[psutil.Popen] = []

    def run(*launcher: str):
        words = (*launcher, str(free_port()), str(TRAIN), "--config", str(config))
        started.append(start((*words, f"output_dir={tmp_path / 'out'}"), {}))
        return started[-1]

    yield run
    for process in started:
        for below in _below(process.pid):
            with suppress(psutil.Error):
                below.kill()
        process.kill()
        process.communicate()


def _below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def rank_of(launcher, rank: int) -> psutil.Process:
    return next(
        process
        for process in _below(launcher.pid)
        if str(TRAIN) in process.cmdline() and process.environ().get("RANK") == str(rank)
    )


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("launcher", "link", "number"),
    [
        (DEEPSPEED, "node", signal.SIGTERM),
        (TORCHRUN, "launcher", signal.SIGTERM),
        (TORCHRUN, "rank 1", signal.SIGUSR1),
    ],
)
def test_a_run_that_is_stopped_saves_on_all_ranks_and_goes_on(
    begin, command, config, whole, tmp_path, launcher, link, number
):
    out = tmp_path / "out"
    process = begin(*launcher)
    wait_for_step(out, 3)

    told = {
        "node": lambda: psutil.Process(process.pid).children()[0],
        "launcher": lambda: process,
        "rank 1": lambda: rank_of(process, 1),
    }[link]()
    told.send_signal(number)
    output = process.communicate(timeout=TIMEOUT_S)[0]

    line = f"megakd: stopped by {signal.Signals(number).name}, student saved at step "
    assert output.count(line) == 1, output
    assert process.returncode != 0
    assert not (out / "lock.json").exists()
    ended = command("--config", str(config), f"output_dir={out}", code=0)
    assert "student: resumed at step" in ended.text
    assert (out / FINAL).read_bytes() == whole


def test_torchrun_brings_a_run_back_whose_rank_dies_three_times(begin, whole, tmp_path):
    process = begin(*TORCHRUN[:-1], "--max-restarts", "3", TORCHRUN[-1])

    for step in (30, 60, 90):
        wait_for_step(tmp_path / "out", step)
        rank_of(process, step // 10 % 2).kill()
    output = process.communicate(timeout=TIMEOUT_S)[0]

    assert process.returncode == 0, output
    assert output.count("student: resumed at step") == 3, output
    assert (tmp_path / "out" / FINAL).read_bytes() == whole
