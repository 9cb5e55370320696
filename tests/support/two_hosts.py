"""Two hosts on this machine: namespaces with an own network, name and /etc/hosts, and a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
PROGRAMS = ("ip", "unshare", "nsenter")
# A host without a loopback interface cannot even reach its own address. The shell ends with the
# test, and its namespaces with the shell.
BOOT = "hostname {name} && mount --bind {hosts} /etc/hosts && ip link set lo up && echo up && cat"


class Host:
    """One of the hosts; all files but /etc/hosts are those of the machine."""

    def __init__(self, name: str, hosts: Path) -> None:
        words = ["unshare", "--net", "--uts", "--mount", "sh", "-c"]
        self.name = name
        self.shell = subprocess.Popen(
            [*words, BOOT.format(name=name, hosts=hosts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.shell.stdout is not None
        self.answer = self.shell.stdout.readline().strip()

    def stop(self) -> None:
        self.shell.kill()
        self.shell.communicate()

    def run(self, *words: str) -> None:
        subprocess.run([*self._enter(), *words], check=True)

    def start(self, words: Sequence[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self._enter(), sys.executable, *words],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self.shell.pid), "--net", "--uts", "--mount"]


@contextmanager
def two_hosts(folder: Path, *, own_name_is_loopback: bool) -> Iterator[list[Host]]:
    """Two hosts that reach each other by name over `eth0`; skips where they cannot be made.

    Args:
        folder: for the files /etc/hosts.
        own_name_is_loopback: each host gives its own name the address 127.0.1.1, as Debian does.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)):
        pytest.skip(f"needs root and the programs {', '.join(PROGRAMS)}, for network namespaces")
    with ExitStack() as stack:
        hosts = []
        for name in ADDRESSES:
            loopback = {name: "127.0.1.1"} if own_name_is_loopback else {}
            known = {"localhost": "127.0.0.1", **ADDRESSES, **loopback}
            file = folder / f"hosts-of-{name}"
            file.write_text("".join(f"{address} {host}\n" for host, address in known.items()))
            hosts.append(Host(name, file))
            stack.callback(hosts[-1].stop)
        if any(host.answer != "up" for host in hosts):
            pytest.skip(f"needs network namespaces: {hosts[0].answer}")
        _connect(*hosts)
        yield hosts


def _connect(one: Host, other: Host) -> None:
    cable = ("type", "veth", "peer", "name", "eth0", "netns", str(other.shell.pid))
    one.run("ip", "link", "add", "eth0", *cable)
    for host in (one, other):
        host.run("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
