"""Two ways of taking a step, by turns in one process: what the first costs beside the second.

`python benchmarks speed.paired_steps [pool kinds sandwich] [--pairs 20] [--ranks 2]`, on CPU ranks.

* pool: a teacher drawn out of five of one size, against one of them alone.
* kinds: features and relations left out, against all four kinds of knowledge.
* sandwich: what a trial of MiniDisc trains, the widest candidate with all the others as views of
  its weights (`--whole`: a model of the teacher's shape with all of them as views), against a
  student of the teacher's shape. A BERT teaches, without dropout: hidden states at seven depths and
  soft targets, as MiniDisc has them.

Both engines take whole steps of megakd's trainer, teacher, losses, backward and update, on the same
batches; who goes first changes with every pair. CPU time is that of all threads of a rank; a
pair's ratio is of the sums over the ranks. Resident memory is that of rank 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from lib import stages
from lib.data import NO_DROPOUT, Config
from lib.launching import write_config
from lib.options import fractions, parsed
from lib.tables import print_rows
from megakd.config.run import RunConfig
from megakd.contract.stage import Constant, Pass, Stage
from megakd.engine.distributed import Ranks
from megakd.methods.minidisc import Sandwich
from megakd.methods.pools import all_teachers
from megakd.methods.skdbert import Drawn
from megakd.pruning.builder import shape_of_cut, unscored

TEACHERS = 5
LEFT_OUT = {"hidden_mse": 0.0, "relation_fsp": 0.0}


class Comparison(NamedTuple):
    """Two sides.

    what: for the table. change: makes the run config out of that of the case.
    sides: the stages, of the teachers' names.
    """

    what: str
    change: Callable[[Config], object]
    sides: Callable[[stages.Bench, Sequence[str], argparse.Namespace], list[Stage]]


def with_five_teachers(tree: Config) -> None:
    teacher = tree.pop("teacher")
    tree["teachers"] = [{"name": f"t{number}", **teacher} for number in range(TEACHERS)]
    tree["method"] = {"name": "skdbert"}


def with_four_kinds(tree: Config) -> None:
    tree["objective"] += [{"loss": loss} for loss in LEFT_OUT]


def as_minidisc(tree: Config) -> None:
    """Change the losses, take out dropout, and give the student the teacher's shape."""
    teacher = tree["teacher"]["model"]["config"] | NO_DROPOUT
    layers = teacher["num_hidden_layers"]
    depths = dict.fromkeys(round(index * layers / 6) for index in range(7))
    tree["objective"] = [
        {"loss": "hidden_mse", "weight": 0.5, "layer_mapping": [f"{d}:{d}" for d in depths]},
        {"loss": "soft_target_kl", "weight": 0.5},
    ]
    tree["student"]["model"] = {"config": teacher}
    # Other weights: a student that is its teacher would have no gradient.
    tree["teacher"]["model"] = {"config": {**teacher, "initializer_range": 0.03}}


def alone(bench: stages.Bench, names: Sequence[str]) -> Stage:
    return bench.stage("student", names, Constant((Pass(teacher=names[0]),)))


def pool_sides(bench: stages.Bench, names: Sequence[str], _: argparse.Namespace) -> list[Stage]:
    drawn = Drawn(tuple(names), (1 / len(names),) * len(names), seed=1)
    return [bench.stage("student", names, drawn), alone(bench, names)]


def kinds_sides(bench: stages.Bench, names: Sequence[str], _: argparse.Namespace) -> list[Stage]:
    some = Constant((Pass(teacher=names[0], weights=LEFT_OUT),))
    return [bench.stage("student", names, some), alone(bench, names)]


def sandwich_sides(
    bench: stages.Bench, names: Sequence[str], given: argparse.Namespace
) -> list[Stage]:
    ranked = unscored(bench.prepared.sources["student"])
    views = {
        f"{sparsity:g}": ranked.view_at(sparsity, allocation="global", round_to=8)
        for sparsity in given.grid
    }
    widest, kind = next(iter(views.values())), bench.config.task.type
    start = {} if given.whole else {"start": shape_of_cut(ranked.source, widest, kind)}
    several = bench.stage(
        "sandwich",
        names,
        Sandwich(names[0], tuple(views)),
        views=views,
        passes_per_backward=given.passes_per_backward,
        **start,
    )
    return [several, alone(bench, names)]


COMPARISONS = {
    "pool": Comparison(
        f"a step with one drawn of {TEACHERS} teachers against one with a single teacher",
        with_five_teachers,
        pool_sides,
    ),
    "kinds": Comparison(
        "a step without features and relations against one with all four kinds",
        with_four_kinds,
        kinds_sides,
    ),
    "sandwich": Comparison(
        "a step of all candidates of MiniDisc against a plain step", as_minidisc, sandwich_sides
    ),
}


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        stages.run_rank(given, measure)
        return 0
    for what in given.what:
        by_rank = stages.on_ranks(__name__, given, partial(write_run, given, what), what)
        show(by_rank, given, what)
    return 0


def write_run(given: argparse.Namespace, what: str, folder: Path) -> None:
    tree = stages.write_case(folder, given)
    COMPARISONS[what].change(tree)
    write_config(folder / "run.yaml", tree)


def measure(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> list[Any]:
    """Return this rank's seconds of both steps; the last is the memory of a teacher."""
    bench = stages.Bench(config, ranks)
    names = all_teachers(bench.lab)
    sides = COMPARISONS[given.what[0]].sides(bench, names, given)
    before = psutil.Process().memory_info().rss
    teachers = {name: bench.teacher(name, sides[-1]) for name in names}
    idle = (psutil.Process().memory_info().rss - before) / len(names)
    with bench.runs(sides, teachers) as runs:
        return [*stages.alternated(runs, given), idle]


def show(by_rank: Sequence[Any], given: argparse.Namespace, what: str) -> None:
    ratio = stages.ratio_over_ranks([rank[:-1] for rank in by_rank])
    numbers = f"CPU time {ratio.median:.3f} ({ratio.milliseconds}), "
    numbers += f"of the fastest steps {ratio.least:.3f}"
    if what == "pool":
        numbers += f"; a teacher adds {by_rank[0][-1] / 1e6:.1f} MB to rank 0"
    student = given.teacher if what == "sandwich" else given.student
    size = f"{given.ranks} rank(s), teacher {given.teacher} {given.teacher_deepspeed}, student "
    size += f"{student} {given.deepspeed}, {given.rows} x {given.length} tokens"
    row = f"{COMPARISONS[what].what}, {size}", numbers, f"95 %: {ratio.between}"
    print_rows(given.command, row)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = stages.step_parser(__doc__)
    parser.add_argument("what", nargs="*", choices=[*COMPARISONS, []], help="default: pool kinds")
    parser.add_argument("--grid", type=fractions, default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--whole", action="store_true", help="of the sandwich: see above")
    parser.add_argument("--passes-per-backward", type=int, help="default: all in one")
    given = parsed(parser, __name__, arguments)
    given.what = given.what or ["pool", "kinds"]
    given.arguments = [word for word in arguments if word not in COMPARISONS]
    return given
