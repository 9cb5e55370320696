"""`python benchmarks NAME` finds, starts and ends benchmarks, and shares the cores among ranks."""

from __future__ import annotations

import importlib
import re

import pytest

from lib.launching import RunFailedError, start_ranks
from lib.tables import spread_of

FAILS = "import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)\n"


def test_without_a_name_all_benchmarks_are_listed_and_each_can_be_imported(run):
    names = re.findall(r"^([a-z_.]+)  ", run().stdout, re.MULTILINE)
    assert {"evidence", "speed.overhead", "memory.plan", "methods.homodistil"} <= {*names}
    for name in names:
        module = f"{name}.__main__" if name == "evidence" else name
        assert callable(importlib.import_module(module).main)


def test_an_unknown_name_is_refused_with_the_known_ones(run):
    ended = run("speed.overhed")
    assert ended.returncode == 2
    assert "there is no benchmark speed.overhed; known:\nevidence" in ended.stderr


def test_what_keeps_a_benchmark_from_running_is_one_line(run, tmp_path):
    ended = run("methods.homodistil", "--data", str(tmp_path))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("methods.homodistil: error: ")
    assert line.endswith("tinystories_1000.json does not exist")


def test_a_rank_that_fails_ends_the_others():
    with pytest.raises(RunFailedError, match="exit code 3"):
        start_ranks(["-c", FAILS], 2)  # and does not wait for rank 0's ten minutes


def test_a_spread_has_the_median_the_quartiles_and_an_interval_around_it():
    spread = spread_of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spread.median == 3.0
    assert spread.quartiles == (2.0, 4.0)
    assert spread.interval[0] < 3.0 < spread.interval[1]
    assert spread_of([1.0, 2.0, 3.0, 4.0, 5.0]) == spread
