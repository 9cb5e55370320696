"""Whole runs over two hosts, each with a network, a name and a cache of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import bert, review_task, run_in
from two_hosts import Host, two_hosts

pytestmark = pytest.mark.slow
PORT = "29533"  # of a network of its own
TIMEOUT_S = 300
INTERFACE = {"GLOO_SOCKET_IFNAME": "eth0"}
Outcome = list[tuple[int, str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    teacher = {"model": bert(2), "finetune": {}, "deepspeed": "teacher_zero3_node"}
    sections = {"method": {"name": "single"}, "train": {"max_steps": 2}}
    return run_in(folder, review_task(folder), teacher=teacher, **sections)


def torchrun(folder: Path, node: int) -> list[str]:
    """Start the launcher on each host; they meet by the name of the first."""
    del folder, node
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    return [*words, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"node-a:{PORT}"]


def deepspeed(folder: Path, node: int) -> list[str]:
    """With a hostfile and without ssh."""
    file = folder / "hostfile"
    file.write_text("node-a slots=1\nnode-b slots=1\n")
    words = ["-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", str(file), "--no_ssh"]
    return [*words, "--node_rank", str(node), "--master_addr", "node-a", "--master_port", PORT]


@pytest.fixture
def train(repository: Path, config: Path, tmp_path: Path) -> Callable[..., Outcome]:
    def run(hosts: list[Host], launcher: Callable[[Path, int], list[str]], **extra: str) -> Outcome:
        search = os.pathsep.join([str(repository), str(repository / "kernels")])
        program = [str(repository / "launch" / "train.py"), "--config", str(config)]
        started = []
        for node, host in enumerate(hosts):
            variables = {"PYTHONPATH": search, "MEGAKD_CACHE": str(tmp_path / f"cache-{node}")}
            words = [*launcher(tmp_path, node), *program, f"output_dir={tmp_path / 'out' / 'run'}"]
            started.append(host.start(words, {**variables, **extra}))
        try:
            output = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
        finally:
            end(started)
        return [(process.returncode, text) for process, text in zip(started, output, strict=True)]

    return run


def end(started: list[subprocess.Popen[str]]) -> None:
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("megakd: ")]


@pytest.mark.parametrize(
    ("launcher", "own_name_is_loopback", "variables"),
    [(torchrun, False, {}), (deepspeed, True, INTERFACE)],
    ids=["torchrun, by name", "deepspeed, by interface"],
)
def test_a_run_over_two_hosts_ends_with_its_report(
    train, tmp_path, launcher, own_name_is_loopback, variables
):
    with two_hosts(tmp_path, own_name_is_loopback=own_name_is_loopback) as hosts:
        outcome = train(hosts, launcher, **variables)

    assert [code for code, _ in outcome] == [0, 0], outcome
    report = json.loads((tmp_path / "out" / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["teacher-finetune", "student"]


def test_hosts_whose_own_names_do_not_connect_them_both_end_and_say_what_to_set(train, tmp_path):
    with two_hosts(tmp_path, own_name_is_loopback=True) as hosts:
        outcome = train(hosts, deepspeed)

    assert all(code != 0 for code, _ in outcome)
    for node, (_, text) in enumerate(outcome):
        (line,) = lines(text)
        assert line.startswith(f"megakd: rank {node} on {hosts[node].name} (node {node}) cannot")
        assert "set GLOO_SOCKET_IFNAME (not set) on every node" in line


def test_hosts_that_do_not_share_output_dir_end_at_the_start(train, tmp_path):
    (tmp_path / "out").mkdir()
    with two_hosts(tmp_path, own_name_is_loopback=False) as hosts:
        hosts[1].run("mount", "-t", "tmpfs", "none", str(tmp_path / "out"))
        outcome = train(hosts, torchrun)

    assert all(code != 0 for code, _ in outcome)
    # The launcher of one host may end its rank when that of the other has ended.
    (line,) = {line for _, text in outcome for line in lines(text)}
    assert f"is not visible as {tmp_path / 'out' / 'run' / 'lock.json'} on node-b" in line
    assert "all nodes must share output_dir" in line
    assert not (tmp_path / "out" / "run" / "checkpoints").exists()
