"""Two ways of taking a step, by turns in one process: what the first costs beside the second.

`python benchmarks speed.paired_steps [pool kinds] [--pairs 20] [--ranks 2]`, on CPU ranks.

* pool: a teacher drawn out of five of one size, against one of them alone.
* kinds: features and relations left out, against all four kinds of knowledge.

Both engines take whole steps of megakd's trainer, teacher, losses, backward and update, on the same
batches; who goes first changes with every pair. CPU time is that of all threads of a rank; a
pair's ratio is of the sums over the ranks. Resident memory is that of rank 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from lib.stages import (
    Bench,
    alternated,
    on_ranks,
    parsed,
    ratio_over_ranks,
    run_rank,
    step_parser,
    write_case,
    write_tree,
)
from lib.tables import print_rows
from megakd.config.run import RunConfig
from megakd.contract.stage import Constant, Pass
from megakd.engine.distributed import Ranks
from megakd.methods.pools import all_teachers
from megakd.methods.skdbert import Drawn

TEACHERS = 5
WHAT = {
    "pool": f"a step with one drawn of {TEACHERS} teachers against one with a single teacher",
    "kinds": "a step without features and relations against one with all four kinds",
}
LEFT_OUT = {"hidden_mse": 0.0, "relation_fsp": 0.0}


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        run_rank(given, measure)
        return 0
    for what in given.what:
        show(
            on_ranks(__name__, given, partial(write_run, given=given, what=what), what), given, what
        )
    return 0


def write_run(folder: Path, given: argparse.Namespace, what: str) -> None:
    """Write the case with five teachers, or with four kinds of knowledge."""
    tree = write_case(folder, given)
    if what == "pool":
        teacher = tree.pop("teacher")
        tree["teachers"] = [{"name": f"t{number}", **teacher} for number in range(TEACHERS)]
        tree["method"] = {"name": "skdbert"}
    else:
        tree["objective"] += [{"loss": loss} for loss in LEFT_OUT]
    write_tree(folder, tree)


def measure(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> list[Any]:
    """Return this rank's seconds of both steps; the last is the memory of a teacher."""
    bench = Bench(config, ranks)
    names = all_teachers(bench.lab)
    stages = [bench.stage("student", names, each) for each in strategies(names, given)]
    before = psutil.Process().memory_info().rss
    teachers = {name: bench.teacher(name, stages[0]) for name in names}
    idle = (psutil.Process().memory_info().rss - before) / len(names)
    with bench.runs(stages, teachers) as runs:
        return [*alternated(runs, given), idle]


def strategies(names: Sequence[str], given: argparse.Namespace) -> tuple[Any, Any]:
    """Return the two sides of the comparison."""
    alone = Constant((Pass(teacher=names[0]),))
    if given.what == ["pool"]:
        return Drawn(tuple(names), (1 / len(names),) * len(names), seed=1), alone
    return Constant((Pass(teacher=names[0], weights=LEFT_OUT),)), alone


def show(by_rank: Sequence[Any], given: argparse.Namespace, what: str) -> None:
    ratio = ratio_over_ranks([rank[:-1] for rank in by_rank])
    numbers = f"CPU time {ratio.median:.3f} ({ratio.milliseconds})"
    if what == "pool":
        numbers += f"; a teacher adds {by_rank[0][-1] / 1e6:.1f} MB to rank 0"
    size = f"{given.ranks} rank(s), teacher {given.teacher} {given.teacher_deepspeed}, student "
    size += f"{given.student} {given.deepspeed}, {given.rows} x {given.length} tokens"
    print_rows(given.command, (f"{WHAT[what]}, {size}", numbers, f"95 %: {ratio.between}"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = step_parser(__doc__)
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], help="default: both")
    given = parsed(parser, __name__, arguments)
    given.what = given.what or list(WHAT)
    given.arguments = [word for word in arguments if word not in WHAT]
    return given
