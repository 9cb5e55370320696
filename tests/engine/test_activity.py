"""The activity of a run: a line of the log each, and a name for an error of a collective."""

import io
import logging

import pytest

from megakd.engine import collectives
from megakd.engine.collectives import doing, told


def test_an_activity_is_one_line_of_the_log_and_what_is_part_of_it_none(caplog):
    caplog.set_level(logging.INFO, logger="megakd")

    with doing("training stage student"), doing("saving step 5 of stage student"):
        pass
    with pytest.raises(ValueError, match="row"), doing("reading the data"):
        raise ValueError("row")
    with doing("measuring latency"):
        pass

    assert [record.getMessage() for record in caplog.records] == [
        "training stage student",
        "reading the data",
        "measuring latency",
    ]


def test_an_error_of_a_collective_carries_the_innermost_activity_first():
    with pytest.raises(RuntimeError) as error, doing("training"), doing("saving step 5"):
        raise RuntimeError("timed out")

    assert error.value.__notes__ == ["saving step 5", "training"]


def test_a_long_activity_says_every_minute_how_far_it_is(caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="megakd")
    minutes = iter(range(100))
    monkeypatch.setattr(collectives.time, "monotonic", lambda: 60.5 * next(minutes))
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(collectives.sys, "stderr", io.StringIO())

    with doing("scoring teacher"):
        # What is part of it tells nothing of its own.
        for _ in told(range(3), total=2500, each=1000):
            assert [*told(range(2), total=2)] == [0, 1]

    assert [record.getMessage() for record in caplog.records] == [
        "scoring teacher",
        "scoring teacher, 1,000 of 2,500 rows",
        "scoring teacher, 2,000 of 2,500 rows",
        "scoring teacher, 2,500 of 2,500 rows",
    ]
