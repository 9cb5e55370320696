"""Cost of the student's part of a HomoDistil step: before a cut, masked, and after the cut.

`python benchmarks speed.homodistil_steps [--pairs 30] [--ranks 1]`, on the CPU.

Three students learn in engines of their own, by turns in one process, on the same masked texts:

* whole: a BERT as it starts, which can be pruned and is not pruned yet;
* masked: the same, with a quarter of every kind of units kept, chosen at random, and nothing cut;
* cut: a model of the kept shape.

A step is forward, backward and update in the student's engine: no teacher, no data, no counts. The
vocabulary is tiny and the loss is cross-entropy, so that nearly all of the step is the encoder.
The average of the sensitivities, which HomoDistil updates in every step, has a clock of its own.
CPU time is that of all threads; a ratio is of the sums over the ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lib.clocks import by_turns
from lib.launching import write_config
from lib.options import parsed
from lib.stages import Bench, on_ranks, run_rank, step_parser, write_case
from lib.tables import Spread, print_rows, ratio_of, spread_of
from megakd.config.run import RunConfig
from megakd.contract.batch import Batch
from megakd.contract.stage import Constant, Pass
from megakd.contract.tasks import STUDENT
from megakd.contract.views import View
from megakd.engine.distributed import Ranks
from megakd.engine.student import device_batch
from megakd.methods.homodistil.schedule import Target, TargetShares
from megakd.methods.homodistil.sensitivity import Averages, group_sizes, update_averages
from megakd.methods.homodistil.strategy import cut_of, everything, select
from megakd.pruning.builder import shape_of_cut
from megakd.training.recipes import label_terms
from megakd.training.stage_run import StageRun

TARGET = 0.25
TARGET_SIZE = ("6x384", 0.25)
SIDES = ("whole", "masked", "cut")
RATE = 1e-4
Clocks = tuple[float, float]
"""CPU seconds of a step, and of the sensitivities beside it."""


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        torch.set_num_threads(given.threads)
        run_rank(given, measure)
    else:
        show(on_ranks(__name__, given, partial(write_run, given=given)), given)
    return 0


def write_run(folder: Path, given: argparse.Namespace) -> None:
    tree = write_case(folder, given)
    del tree["teacher"], tree["objective"], tree["task"]["label_column"]
    tree["task"]["type"] = "mlm"
    tree["method"] = {"name": "finetune"}
    heads = {"num_attention_heads": given.heads, "max_position_embeddings": given.length}
    tree["student"]["model"]["config"] |= heads
    write_config(folder / "run.yaml", tree)


def measure(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> list[dict[str, Clocks]]:
    """Return this rank's clocks of every round, without those of the warm-up."""
    bench = Bench(config, ranks)
    source = bench.prepared.sources[STUDENT]
    whole = source.units
    goal = goal_of(whole, given.keep)
    starts: dict[str, tuple[Any, View]] = {
        "whole": (source, whole),
        "masked": (source, goal),
        "cut": (shape_of_cut(source, goal, config.task.type), goal),
    }
    terms = label_terms(config)
    stages = [
        bench.stage(name, (), PrunedTo(left=left), objective=terms, start=start)
        for name, (start, left) in starts.items()
    ]
    with bench.runs(stages, {}) as runs:
        by_name = dict(zip(SIDES, runs, strict=True))
        mask(by_name["masked"].student, goal)
        return rounds(by_name, given)


@dataclass(frozen=True, kw_only=True)
class PrunedTo(Constant):
    """One pass without a teacher, of a student that `mask` prunes."""

    left: View

    @property
    def pruned_to(self) -> View:
        return self.left


def goal_of(whole: View, share: float) -> View:
    """Return the units of the student: the same share of every kind, and all heads."""
    part = Fraction(str(share))
    return Target(whole, TargetShares(Fraction(1), part, part, part)).goal


def mask(student: Any, goal: View) -> None:
    """Keep units that were chosen at random, as HomoDistil keeps the most sensitive ones."""
    count = sum(group_sizes(student.makers, student.units).values())
    scores = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = select(scores, everything(student), goal, student, monotone=True)
    student.keep(cut_of(student, kept))


def rounds(runs: Mapping[str, StageRun], given: argparse.Namespace) -> list[dict[str, Clocks]]:
    source, device = runs["whole"].source, runs["whole"].ranks.device
    averages: dict[str, Averages] = {name: {} for name in runs}

    def step(name: str, index: int) -> Clocks:
        (batch,) = source.step(index)
        return timed_step(runs[name], device_batch(batch, device), averages[name])

    sides = [partial(step, name) for name in SIDES]
    found = by_turns(sides, given.pairs, warm_up=given.warm_up)
    return [dict(zip(SIDES, one, strict=True)) for one in found]


def timed_step(run: StageRun, batch: Batch, averages: Averages) -> Clocks:
    """Return the clocks of one step, which all ranks begin together."""
    counts = run.trainer.count_units([batch])
    student: Any = run.student
    dist.barrier()
    began = time.process_time()
    student.forward_backward(batch, {}, (Pass(),), counts, boundary=True)
    learned = time.process_time()
    shards = (shard for shard in student.local_shards() if shard.name in student.makers)
    update_averages(averages, shards, beta=0.85, uncertainty_beta=None)
    averaged = time.process_time()
    student.step(RATE)
    return time.process_time() - averaged + learned - began, averaged - learned


def show(by_rank: Sequence[Sequence[Any]], given: argparse.Namespace) -> None:
    columns = list(zip(*by_rank, strict=True))
    steps, averages = (
        {name: [sum(rank[name][place] for rank in one) for one in columns] for name in SIDES}
        for place in (0, 1)
    )
    for name in SIDES:
        step, average = (1000 * spread_of(clock[name]).median for clock in (steps, averages))
        print(f"{name}: {step:.1f} ms of CPU time, sensitivities {average:.2f} ms")
    both = {n: [a + b for a, b in zip(steps[n], averages[n], strict=True)] for n in SIDES}
    ratios: dict[str, Spread] = {
        name: ratio_of(list(zip(clock[name], clock["whole"], strict=True)))
        for name, clock in (("masked", steps), ("cut", steps))
    }
    for name, ratio in ratios.items():
        print(f"{name} / whole: {ratio.median:.3f} (95 %: {ratio.between()})")
    whole = ratio_of(list(zip(both["cut"], both["whole"], strict=True)))
    print(f"cut / whole with the sensitivities: {whole.median:.3f} (95 %: {whole.between()})")
    if (given.student, given.keep) == TARGET_SIZE:
        print(f"target {TARGET}: {'met' if ratios['cut'].median <= TARGET else 'missed'}")
    what = f"student's part of a step, {given.keep:.0%} of every width, {given.student}, "
    what += f"{given.ranks} rank(s), {given.rows} x {given.length} tokens, {given.deepspeed}"
    numbers = ", ".join(f"{name} {ratio.median:.3f}" for name, ratio in ratios.items())
    between = ", ".join(f"{name} {ratio.between()}" for name, ratio in ratios.items())
    print_rows(given.command, (what, f"CPU time: {numbers}", f"95 %: {between}"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = step_parser(__doc__, ranks=1, pairs=30, student="6x384", vocabulary=300)
    parser.add_argument("--threads", type=int, default=1, help="of every rank")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--keep", type=float, default=0.25, help="share of every kind of units")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    given = parsed(parser, __name__, arguments)
    if given.quick:
        given.student, given.heads = "2x32", 4
        given.pairs, given.warm_up, given.rows, given.length = 3, 1, 2, 8
    return given
