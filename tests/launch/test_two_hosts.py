"""Whole runs over two hosts, each with a network, a name and a cache of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import bert, review_task, run_in

pytestmark = pytest.mark.slow
ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
PROGRAMS = ("ip", "unshare", "nsenter")
# A host without a loopback interface cannot even reach its own address. The shell ends with the
# test, and its namespaces with the shell.
BOOT = "hostname {name} && mount --bind {hosts} /etc/hosts && ip link set lo up && echo up && cat"


def started(words: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, text=True, **output, **options)


class Host:
    """One of the hosts; all files but /etc/hosts are those of the machine."""

    def __init__(self, name: str, hosts: Path) -> None:
        words = ["unshare", "--net", "--uts", "--mount", "sh", "-c"]
        boot = BOOT.format(name=name, hosts=hosts)
        self.name, self.shell = name, started([*words, boot], stdin=subprocess.PIPE)
        self.enter = ["nsenter", "--target", str(self.shell.pid), "--net", "--uts", "--mount"]
        self.answer = self.shell.stdout.readline().strip()

    def stop(self) -> None:
        self.shell.kill()
        self.shell.communicate()

    def run(self, *words: str) -> None:
        subprocess.run([*self.enter, *words], check=True)

    def start(self, words: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
        env = {**os.environ, **variables}
        return started([*self.enter, sys.executable, *words], env=env, start_new_session=True)


@contextmanager
def two_hosts(folder: Path, *, loopback_names: bool) -> Iterator[list[Host]]:
    """Two hosts that reach each other by name over `eth0`; skips where they cannot be made.

    With `loopback_names`, a host's own name has the address 127.0.1.1, as on Debian.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)):
        pytest.skip(f"needs root and the programs {', '.join(PROGRAMS)}, for network namespaces")
    with ExitStack() as stack:
        hosts = []
        for name in ADDRESSES:
            loopback = {name: "127.0.1.1"} if loopback_names else {}
            known = {"localhost": "127.0.0.1", **ADDRESSES, **loopback}
            file = folder / f"hosts-of-{name}"
            file.write_text("".join(f"{address} {host}\n" for host, address in known.items()))
            hosts.append(Host(name, file))
            stack.callback(hosts[-1].stop)
        if any(host.answer != "up" for host in hosts):
            pytest.skip(f"needs network namespaces: {hosts[0].answer}")
        cable = ("type", "veth", "peer", "name", "eth0", "netns", str(hosts[1].shell.pid))
        hosts[0].run("ip", "link", "add", "eth0", *cable)
        for host in hosts:
            host.run("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        yield hosts


PORT = "29533"  # of a network of its own
TIMEOUT_S = 300
INTERFACE = {"GLOO_SOCKET_IFNAME": "eth0"}
Outcome = list[tuple[int, str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    teacher = {"model": bert(2), "finetune": {}, "deepspeed": "teacher_zero3_node"}
    sections = {"method": {"name": "single"}, "train": {"max_steps": 2, "collective_timeout": 30}}
    return run_in(folder, review_task(folder), teacher=teacher, **sections)


def torchrun(_: Path, __: int) -> list[str]:
    """Start the launcher on each host; they meet by the name of the first."""
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
        ranks = []
        for node, host in enumerate(hosts):
            variables = {"PYTHONPATH": search, "MEGAKD_CACHE": str(tmp_path / f"cache-{node}")}
            words = [*launcher(tmp_path, node), *program, f"output_dir={tmp_path / 'out' / 'run'}"]
            ranks.append(host.start(words, {**variables, **extra}))
        try:
            output = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGKILL)
        return [(rank.returncode, text) for rank, text in zip(ranks, output, strict=True)]

    return run


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("megakd: ")]


@pytest.mark.parametrize(
    ("launcher", "loopback_names", "variables"),
    [(torchrun, False, {}), (deepspeed, True, INTERFACE)],
    ids=["torchrun, by name", "deepspeed, by interface"],
)
def test_a_run_over_two_hosts_ends_with_its_report(
    train, tmp_path, launcher, loopback_names, variables
):
    with two_hosts(tmp_path, loopback_names=loopback_names) as hosts:
        outcome = train(hosts, launcher, **variables)

    assert [code for code, _ in outcome] == [0, 0], outcome
    report = json.loads((tmp_path / "out" / "run" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["teacher-finetune", "student"]


def test_hosts_whose_own_names_do_not_connect_them_both_end_and_say_what_to_set(train, tmp_path):
    with two_hosts(tmp_path, loopback_names=True) as hosts:
        outcome = train(hosts, deepspeed)

    assert all(code != 0 for code, _ in outcome)
    for node, (_, text) in enumerate(outcome):
        (line,) = lines(text)
        assert line.startswith(f"megakd: rank {node} on {hosts[node].name} (node {node}) cannot")
        assert "set GLOO_SOCKET_IFNAME (not set) on every node" in line


def test_hosts_that_do_not_share_output_dir_end_at_the_start(train, tmp_path):
    (tmp_path / "out").mkdir()
    with two_hosts(tmp_path, loopback_names=False) as hosts:
        hosts[1].run("mount", "-t", "tmpfs", "none", str(tmp_path / "out"))
        outcome = train(hosts, torchrun)

    assert all(code != 0 for code, _ in outcome)
    # The launcher of one host may end its rank when that of the other has ended.
    (line,) = {line for _, text in outcome for line in lines(text)}
    assert f"is not visible as {tmp_path / 'out' / 'run' / 'lock.json'} on node-b" in line
    assert "all nodes must share output_dir" in line
    assert not (tmp_path / "out" / "run" / "checkpoints").exists()
