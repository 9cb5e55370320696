"""The activity that a rank tells the others."""

import logging
import time

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


def test_a_failure_of_the_work_itself_is_not_hidden(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)

    with pytest.raises(RuntimeError, match="disk"), activity.doing("saving"):
        raise RuntimeError("the disk is full")


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
