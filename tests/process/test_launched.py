"""Ranks end with their launchers; a process without a launcher does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from megakd.process import signals

RANK = """
import sys, time
from megakd.process.signals import Stopped, watched
try:
    with watched():
        print("rank is ready", flush=True)
        time.sleep(600)
except Stopped as stop:
    print(stop, flush=True)
    sys.exit(stop.exit_code)
"""
# Waits for the end of the process that started it, and says whether that is the end of a launcher.
CHILD = """
import os, time
from megakd.process.signals import Launchers
launchers, parent = Launchers(), os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
print(len(launchers.chain), launchers.have_ended(), flush=True)
"""
START = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
print(os.path.basename(sys.argv[0]), os.getpid(), flush=True)
child.wait()
"""


@pytest.fixture
def chain(tmp_path: Path) -> list[str]:
    """A runner that starts a launcher that starts a rank, as `deepspeed` does."""
    texts = {"bin/deepspeed": START, "deepspeed/launcher/launch.py": START, "rank.py": RANK}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return [str(tmp_path / name) for name in texts]


@pytest.mark.parametrize(
    ("link", "number"), [("deepspeed", signal.SIGKILL), ("launch.py", signal.SIGTERM)]
)
def test_a_rank_ends_when_any_process_above_it_that_launched_it_ends(chain, link, number):
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_PROCID"} | {"RANK": "0"}
    command = [sys.executable, *chain]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = [process.stdout.readline() for _ in range(3)]
        assert "rank is ready\n" in output
        pids = dict(
            line.split() for line in output if line.startswith(("deepspeed ", "launch.py "))
        )

        os.kill(int(pids[link]), number)

        # The pipe closes when the last of the three has ended.
        assert process.stdout.read() == (
            "stopped by the end of its launcher; start the same command again to continue\n"
        )


@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}], ids=["plain", "rank by hand"])
def test_a_process_that_no_launcher_started_outlives_its_shell(variables):
    shell = f"{sys.executable} -c '{CHILD}' & read line"
    pipe = subprocess.PIPE
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | variables
    with subprocess.Popen(
        ["sh", "-c", shell], env=environment, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()

        process.stdin.close()

        assert process.stdout.read() == "0 False\n"


def test_a_rank_whose_launcher_ended_while_it_started_knows(monkeypatch):
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(psutil.Process, "parents", lambda _: [])
    monkeypatch.setattr(signals.os, "getppid", lambda: 1)
    monkeypatch.setattr(psutil.Process, "name", lambda _: "systemd")

    assert signals.Launchers().have_ended()

    monkeypatch.setattr(psutil.Process, "name", lambda _: "python3.12")
    assert not signals.Launchers().have_ended()  # process 1 of a container is the launcher


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        ("/usr/bin/torchrun --nproc_per_node 2 launch/train.py", True),
        ("python -m torch.distributed.run launch/train.py", True),
        ("/venv/bin/python3.11 -u -m deepspeed.launcher.launch --world_info=x", True),
        ("python3 /venv/bin/deepspeed launch/train.py", True),
        ("python launch/pod.py --nnodes 2 launch/train.py", True),
        ("/venv/bin/python /venv/bin/accelerate launch launch/train.py", True),
        ("slurmstepd:", True),
        ("bash run_deepspeed.sh", False),
        ("python launch/train.py --config deepspeed.yaml", False),
        ("python -m pytest tests/test_launched.py", False),
    ],
)
def test_launchers_are_known_by_their_program(words, launches):
    process: Any = SimpleNamespace(cmdline=words.split)

    assert signals.is_launcher(process) is launches
