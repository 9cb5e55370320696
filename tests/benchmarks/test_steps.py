"""Benchmarks of steps and calls: both sides compute one thing, and both are timed and printed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib.clocks import Clocks, over_ranks
from lib.launching import write_config
from megakd.config.file import load_config
from memory import by_ranks, plan, planning_table
from speed.causal_step import check_agree

SMALL = "--vocabulary 300 --rows 2 --length 8 --pairs 3 --warm-up 1"
TINY = f"{SMALL} --teacher 2x32 --student 2x32"
COMMANDS = [
    (f"speed.overhead {TINY} --alone 3", "step against a bare loop, 1 rank(s), 3 pairs"),
    ("speed.causal_step --quick --pairs 2", "jsd, megakd, a step against a bare loop, 2 pairs"),
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
def test_the_predicted_peak_is_within_a_tenth_of_the_measured(run, number):
    """In a process of its own: the plan counts the memory of the process that plans."""
    ended = run("memory.plan", "--cases", str(number))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


def test_every_case_of_a_plan_and_of_its_table_is_a_run_that_megakd_accepts(tmp_path):
    for number in (0, 9, 10, 11):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert plan.config_of(plan.CASES[number], folder).train.max_steps == 3
    load_config(write_config(tmp_path / "ranks.yaml", by_ranks.run_tree(tmp_path, 2)))
    for name in planning_table.RUNS:
        load_config(write_config(tmp_path / f"{name}.yaml", planning_table.run_config(name)))
