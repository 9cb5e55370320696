"""The activity of a run: a line of the log each, and a name for an error of a collective."""

import logging

import pytest

from megakd.engine.collectives import doing


def test_an_activity_is_one_line_of_the_log_and_what_is_part_of_it_none(caplog):
    caplog.set_level(logging.INFO, logger="megakd")

    with doing("training stage student"), doing("saving step 5 of stage student"):
        pass
    with pytest.raises(ValueError, match="row"), doing("reading the data"):
        raise ValueError("row")
    with doing("measuring latency"):
        pass

    assert [record.getMessage() for record in caplog.records] == [
        "… training stage student",
        "… reading the data",
        "… measuring latency",
    ]


def test_an_error_of_a_collective_carries_the_innermost_activity_first():
    with pytest.raises(RuntimeError) as error, doing("training"), doing("saving step 5"):
        raise RuntimeError("timed out")

    assert error.value.__notes__ == ["saving step 5", "training"]
