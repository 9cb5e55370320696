"""Heartbeats for the monitor of another launcher."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from megakd.engine import activity


@pytest.fixture
def calls(monkeypatch):
    """What the client of a monitor is told, by a stand-in of its package."""
    told: list[str] = []
    names = ("init_workload_monitoring", "send_heartbeat", "shutdown_workload_monitoring")
    client = SimpleNamespace(**{name: lambda name=name: told.append(name) for name in names})
    package = SimpleNamespace(RankMonitorClient=lambda: client)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", package)
    return told


def test_a_monitor_hears_of_every_batch_and_of_the_end(calls, monkeypatch):
    monkeypatch.setenv(activity.MONITOR, "/run/monitor")
    with suppress(ValueError), activity.monitored():
        activity.reached("batch 1")
        activity.reached("batch 2")
        raise ValueError("row")
    activity.reached("batch 3")

    beats = ["send_heartbeat"] * 2
    assert calls == ["init_workload_monitoring", *beats, "shutdown_workload_monitoring"]


def test_without_a_monitor_nothing_is_imported_or_told(calls, monkeypatch):
    monkeypatch.delenv(activity.MONITOR, raising=False)
    with activity.monitored():
        activity.reached("batch 1")

    assert calls == []
