"""Whatever ends a launcher, its ranks save, end and go on from there."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import DEEPSPEED, TIMEOUT_S, TORCHRUN, TRAIN, free_port, start
from test_launchers import train, weights
from tiny_runs import review_task, run_in

pytestmark = pytest.mark.slow
STEPS = 300
LAUNCHERS = {"deepspeed": DEEPSPEED, "torchrun": TORCHRUN}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    sections = {"student": {"deepspeed": "zero2"}, "log": {"logging_steps": 1}}
    return run_in(folder, review_task(folder), train={"max_steps": STEPS}, **sections)


@pytest.fixture(scope="module")
def truth(launch, config, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("truth") / "out"
    group = launch("--config", str(config), f"output_dir={out}")
    assert group.wait() == [0, 0], group.text
    return weights(out)


class Started:
    def __init__(self, launcher: str, config: Path, out: Path) -> None:
        self.out = out
        words = (*LAUNCHERS[launcher], str(free_port()), *train(config, out))
        self.process = start(words, {})
        self._wait_for_a_step()
        below = psutil.Process(self.process.pid).children(recursive=True)
        self.ranks = [p for p in below if "RANK" in p.environ() and str(TRAIN) in p.cmdline()]

    def _wait_for_a_step(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not (self.out / "metrics.jsonl").exists():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def send(self, link: str, number: int) -> None:
        launcher = psutil.Process(self.process.pid)
        pids = {"runner": launcher.pid, "node": launcher.children()[0].pid}
        pids["rank 1"] = next(p.pid for p in self.ranks if p.environ()["RANK"] == "1")
        os.kill(pids[link], number)

    def finish(self) -> str:
        _, alive = psutil.wait_procs(self.ranks, timeout=TIMEOUT_S)
        assert alive == []
        return self.process.communicate(timeout=TIMEOUT_S)[0]

    def kill(self) -> None:
        for process in self.ranks:
            if process.is_running():
                process.kill()
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize(
    ("launcher", "link", "number", "reason"),
    [
        ("deepspeed", "runner", signal.SIGKILL, "the end of its launcher"),
        ("deepspeed", "node", signal.SIGTERM, "SIGTERM"),
        ("deepspeed", "rank 1", signal.SIGUSR1, "SIGUSR1"),
        ("torchrun", "runner", signal.SIGTERM, "SIGTERM"),
        ("torchrun", "runner", signal.SIGKILL, "the end of its launcher"),
    ],
)
def test_a_run_whose_launcher_is_stopped_saves_and_goes_on_to_the_same_weights(
    truth, launch, config, tmp_path, request, launcher, link, number, reason
):
    run = Started(launcher, config, tmp_path / "out")
    request.addfinalizer(run.kill)

    run.send(link, number)
    outcome = run.finish()

    assert len(run.ranks) == 2
    assert outcome.count(f"megakd: stopped by {reason}, student saved at step ") == 1, outcome
    assert 'launch/train.py", line' not in outcome  # no traceback of a rank
    assert not (run.out / "lock.json").exists()
    assert not (run.out / "report.json").exists()
    assert run.process.returncode != 0 or number == signal.SIGKILL
    group = launch("--config", str(config), f"output_dir={run.out}")
    assert group.wait() == [0, 0], group.text
    assert "student: resumed at step" in group.text
    assert weights(run.out) == truth
