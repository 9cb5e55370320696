"""The activity that a rank tells the others, and the monitor of another launcher."""

import logging
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megakd.engine import activity


class LostStore:
    def set(self, *_):
        raise dist.DistNetworkError("Broken pipe")


def test_a_rank_goes_on_to_save_although_the_store_of_the_activities_is_gone(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(activity, "_store", LostStore)
    saved = []

    with activity.doing("saving stage student at step 3"):
        saved.append(3)

    assert saved == [3]


def test_a_silent_log_says_what_the_run_does_and_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(activity, "SILENCE_S", 0.3)
    caplog.set_level(logging.INFO, logger="megakd")

    with activity.told(), activity.doing("measuring layer 2 of 3"):
        activity.reached("batch 7")
        time.sleep(0.5)
        activity.reached("step 8 of 9", shown=True)
        logging.getLogger("megakd.run").info("a line")
        time.sleep(0.2)

    assert [record.getMessage() for record in caplog.records] == [
        "… measuring layer 2 of 3, batch 7",
        "a line",
    ]


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
