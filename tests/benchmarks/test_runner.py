"""`python benchmarks NAME` finds, starts and ends benchmarks, and shares the cores among ranks."""

from __future__ import annotations

import importlib
import re
from types import SimpleNamespace

import pytest

from lib.clocks import Clocks, over_ranks
from lib.launching import RunFailedError, start_ranks
from lib.tables import spread_of
from megakd.reports.plan import Cluster, plan_run
from memory import plan
from speed.causal_step import check_agree

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


# Steps and calls: both sides compute one thing, and both are timed and printed.

SMALL = "--vocabulary 300 --rows 2 --length 8 --pairs 3 --warm-up 1"
TINY = f"{SMALL} --teacher 2x32 --student 2x32"
COMMANDS = [
    (f"speed.overhead {TINY} --alone 3", "step against a bare loop, 1 rank(s), 3 pairs"),
    ("speed.causal_step --quick --pairs 2", "jsd, megakd, a step against a bare loop, 2 pairs"),
    ("speed.fused_layers --quick --pairs 2", "fp32, a step with fused layers against one without"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "shown"), COMMANDS, ids=[c.split()[0] for c, _ in COMMANDS])
def test_both_sides_are_measured_and_printed(run, command, shown):
    ended = run(*command.split())
    assert ended.returncode == 0, ended.stderr
    assert shown in ended.stdout
    assert command.split()[0] in ended.stdout or "| what |" not in ended.stdout


def test_sides_that_compute_different_things_are_refused():
    def side(loss: float):
        return SimpleNamespace(loss=lambda index: loss + 0 * index)

    check_agree(side(1.00005), side(1.0), 0)
    with pytest.raises(ValueError, match=r"after 3 steps the loss is 1\.001, and the other side's"):
        check_agree(side(1.001), side(1.0), 3)


def test_cpu_time_is_that_of_all_ranks_and_wall_clock_that_of_the_slowest():
    by_rank = [[[(1.0, 4.0), (2.0, 2.0)]], [[(3.0, 5.0), (2.5, 1.0)]]]
    assert over_ranks(by_rank) == [[Clocks(4.0, 5.0), Clocks(4.5, 2.0)]]


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 6])
def test_the_planned_peak_is_at_most_a_tenth_below_and_a_quarter_above_the_measured(run, number):
    ended = run("memory.plan", "--cases", str(number))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


FAST, WITHOUT_PROCESS = (1, 4, 5, 10), 0


@pytest.mark.parametrize(
    "number",
    [
        number if number in FAST else pytest.param(number, marks=pytest.mark.slow)
        for number in range(1, len(plan.CASES) + 1)
    ],
)
def test_a_plan_holds_what_was_measured(tmp_path, number):
    case = plan.CASES[number - 1]
    config = plan.config_of(case, tmp_path)

    planned = plan_run(config, Cluster(ranks=case.ranks), process=WITHOUT_PROCESS)

    error = planned.peak_bytes_per_rank / (case.measured * 1e6)
    assert plan.LEAST <= error <= plan.MOST
