"""The activity that a rank tells the others."""

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
