"""Cost of a step with seven candidates, against a plain distillation step at full width.

`python benchmarks speed.sandwich [--stages 0,2,3] [--pairs 12]`, on two CPU ranks.

A BERT teaches, without dropout: hidden states at seven depths and soft targets, as MiniDisc has
them. Two engines learn in one process, in alternating order on the same batches: a student of the
teacher's shape, and what a trial of MiniDisc trains, the widest candidate with all the others as
views of its weights (`--whole`: a model of the teacher's shape with all of them as views). Both
take whole steps of megakd's trainer: teacher, losses, backward, update.

CPU time is that of all threads of a rank; a pair's ratio is of the sums over the ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lib.options import fractions, integers
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
from megakd.methods.minidisc import Sandwich
from megakd.pruning.builder import shape_of_cut, unscored

TARGETS = {0: 1.75, 2: 1.75, 3: 2.1}
TARGET_SIZE = ("6x384", 16, 64)
"""What the targets are about; in smaller models what a step costs is not in the matrices."""
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        run_rank(given, measure)
        return 0
    for stage in given.stages:
        show(on_ranks(__name__, given, partial(write_run, given=given, stage=stage)), given, stage)
    return 0


def write_run(folder: Path, given: argparse.Namespace, stage: int) -> None:
    """Write the case with other losses, no dropout, and a student of the teacher's shape."""
    given.student, given.deepspeed = given.teacher, f"zero{stage}"
    tree = write_case(folder, given)
    layers = tree["student"]["model"]["config"]["num_hidden_layers"]
    depths = dict.fromkeys(round(index * layers / 6) for index in range(7))
    tree["objective"] = [
        {"loss": "hidden_mse", "weight": 0.5, "layer_mapping": [f"{d}:{d}" for d in depths]},
        {"loss": "soft_target_kl", "weight": 0.5},
    ]
    for role in ("teacher", "student"):
        tree[role]["model"]["config"] |= NO_DROPOUT
    # Other weights: a student that is its teacher would have no gradient.
    tree["teacher"]["model"]["config"]["initializer_range"] = 0.03
    write_tree(folder, tree)


def measure(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> list[list[float]]:
    """Return this rank's seconds of both steps."""
    bench = Bench(config, ranks)
    name = bench.lab.teacher()
    ranked = unscored(bench.prepared.sources["student"])
    views = {
        f"{sparsity:g}": ranked.view_at(sparsity, allocation="global", round_to=8)
        for sparsity in given.grid
    }
    widest = next(iter(views.values()))
    start = None if given.whole else shape_of_cut(ranked.source, widest, config.task.type)
    several = bench.stage(
        "sandwich",
        [name],
        Sandwich(name, tuple(views)),
        views=views,
        passes_per_backward=given.passes_per_backward,
        **({} if start is None else {"start": start}),
    )
    plain = bench.stage("plain", [name], Constant((Pass(teacher=name),)))
    with bench.runs([several, plain], {name: bench.teacher(name, plain)}) as runs:
        return alternated(runs, given)


def show(
    by_rank: Sequence[Sequence[Sequence[float]]], given: argparse.Namespace, stage: int
) -> None:
    ratio = ratio_over_ranks(by_rank)
    print(f"ZeRO {stage}: {ratio.median:.3f} (95 %: {ratio.between}), {ratio.milliseconds}")
    target = TARGETS.get(stage)
    if target is not None and (given.teacher, given.rows, given.length) == TARGET_SIZE:
        print(f"  target {target}: {'met' if ratio.median <= target else 'missed'}")
    what = f"sandwich of {len(given.grid)} against a plain step, ZeRO {stage}, "
    what += f"{given.ranks} rank(s), {given.teacher}, {given.rows} x {given.length} tokens"
    numbers = f"CPU time {ratio.median:.2f}, of the fastest steps {ratio.least:.2f}"
    print_rows(given.command, (what, numbers, f"95 %: {ratio.between}"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = step_parser(__doc__, pairs=12, warm_up=2, teacher_deepspeed="teacher_zero0")
    parser.add_argument("--stages", type=integers, default=[0, 2, 3], help="ZeRO's, of the student")
    parser.add_argument("--grid", type=fractions, default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--whole", action="store_true", help="of the sandwich: see above")
    parser.add_argument("--passes-per-backward", type=int, help="default: all in one")
    return parsed(parser, __name__, arguments)
