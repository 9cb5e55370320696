"""Heartbeats for the rank monitor of NVIDIA's `ft_launcher`, which restarts a run that hangs.

The monitor tells a rank its socket by a variable, and needs the package nvidia-resiliency-ext.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MONITOR = "FT_RANK_MONITOR_IPC_SOCKET"
_clients: list[Any] = []


@contextmanager
def monitored() -> Iterator[None]:
    """Let `beat` reach the monitor in the body; without a monitor, `beat` does nothing."""
    if not os.environ.get(MONITOR):
        yield
        return
    client = importlib.import_module("nvidia_resiliency_ext.fault_tolerance").RankMonitorClient()
    client.init_workload_monitoring()
    _clients.append(client)
    try:
        yield
    finally:
        _clients.remove(client)
        client.shutdown_workload_monitoring()


def beat() -> None:
    """Tell the monitor that this rank makes progress; call it between two steps or batches."""
    for client in _clients:
        client.send_heartbeat()
