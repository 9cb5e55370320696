"""A rank that is lost ends all others by name; a launcher that restarts brings the run back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import TIMEOUT_S, TRAIN, Group, free_port, ranks_of, start
from test_launchers import hostfile, rendezvous
from tiny_runs import review_task, run_in

PROGRAM = Path(__file__).with_name("lost_ranks.py")
LOST = 2


@pytest.fixture
def lose(launch, request):
    """Start three ranks, of which the last is lost, and wait until the others have ended."""

    def run(case: str) -> Group:
        group = launch(case, program=PROGRAM, ranks=ranks_of(3))
        request.addfinalizer(group.kill)
        others = group.processes[:LOST]
        group.wait_until(lambda: all(rank.exitcode is not None for rank in others))
        return group

    return run


LOST_RANK = rf"^megakd: rank {{}} ends because rank {LOST} on \S+ "


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("work", f"{LOST_RANK}has ended"),
        ("waiting", f"{LOST_RANK}has ended with ValueError; see the output"),
        ("forked", f"{LOST_RANK}has ended"),
        ("stopped", f"{LOST_RANK}has not answered for 2 s"),
        # Stopped before they are watched, or before they meet the others.
        ("joined", "^megakd: rank {} ends because the ranks have not met within 2.5 s"),
        ("unwatched", "^megakd: rank {} ends because the ranks have not met within 2.5 s"),
        (
            "absent",
            r"PeerLostError: not all of 3 ranks have met at \S+ within 6 s .*; see the output",
        ),
    ],
)
def test_a_rank_that_is_lost_ends_all_others_with_a_line_each(lose, case, line):
    group = lose(case)

    assert [rank.exitcode for rank in group.processes[:LOST]] == [1, 1]
    for rank, log in enumerate(group.logs[:LOST]):
        said = re.findall(line.format(rank), log.read_text(), re.MULTILINE)
        assert len(said) == 1, group.text


def test_ranks_that_end_one_after_another_lose_nobody(lose):
    group = lose("ended")

    assert group.wait() == [0, 0, 0]
    assert "ends because" not in group.text


STEPS = 300


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lost")
    return run_in(
        folder,
        review_task(folder),
        student={"deepspeed": "zero2"},
        train={"max_steps": STEPS, "collective_timeout": 12},
        save={"save_steps": 20},
        log={"logging_steps": 1},
    )


def rank_of(launcher: subprocess.Popen[str], rank: int) -> psutil.Process | None:
    for process in psutil.Process(launcher.pid).children(recursive=True):
        try:
            is_rank = str(TRAIN) in process.cmdline()
            if is_rank and process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:
            continue
    return None


def end(launchers: Sequence[subprocess.Popen[str]]) -> None:
    for launcher in launchers:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.kill()
        launcher.kill()
        launcher.communicate()


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [hostfile, rendezvous])
@pytest.mark.parametrize(
    ("number", "how"), [(signal.SIGKILL, "has ended"), (signal.SIGSTOP, "has not answered for ")]
)
def test_a_rank_that_is_lost_ends_the_launchers_of_two_nodes(
    config, tmp_path, launcher, number, how
):
    out = tmp_path / "out"
    words = (str(TRAIN), "--config", str(config), f"output_dir={out}", "train.max_steps=1000000")
    nodes = [
        start((*command, *words), {"MEGAKD_CACHE": tmp_path / f"cache-{node}"})
        for node, command in enumerate(launcher(tmp_path))
    ]
    try:
        wait_for_step(out, 3)
        lost = next(rank for node in nodes if (rank := rank_of(node, 1)) is not None)
        os.kill(lost.pid, number)
        began = time.monotonic()
        survivor = next(node for node in nodes if rank_of(node, 0) is not None)
        output = survivor.communicate(timeout=TIMEOUT_S)[0]
        print(f"{time.monotonic() - began:.1f} s")  # noqa: T201 - for the measurements
        assert survivor.returncode != 0
        assert re.search(rf"megakd: rank 0 ends because rank 1 on \S+ .*{how}", output), output
    finally:
        end(nodes)


@pytest.mark.slow
def test_torchrun_brings_a_run_back_whose_rank_dies_three_times(config, tmp_path, launch):
    whole = tmp_path / "whole"
    group = launch("--config", str(config), f"output_dir={whole}")
    assert group.wait() == [0, 0], group.text
    out = tmp_path / "out"
    words = ("--nproc_per_node", "2", "--max-restarts", "3", "--master_port", str(free_port()))
    command = ("-m", "torch.distributed.run", *words, str(TRAIN), "--config", str(config))
    launcher = start((*command, f"output_dir={out}"), {})
    try:
        for step in (30, 80, 150):
            wait_for_step(out, step)
            victim = rank_of(launcher, step // 10 % 2)
            assert victim is not None
            victim.kill()
        output = launcher.communicate(timeout=TIMEOUT_S)[0]
    finally:
        end([launcher])

    assert launcher.returncode == 0, output
    assert output.count("student: resumed at step") == 3, output
    final = "final/model.safetensors"
    assert (out / final).read_bytes() == (whole / final).read_bytes()
