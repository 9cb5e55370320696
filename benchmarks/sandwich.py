"""Cost of a step with seven candidates, against a plain distillation step at full width.

`python benchmarks/sandwich.py [--stages 0,2,3] [--pairs 12]`, on two CPU ranks.

A BERT teaches, without dropout: hidden states at seven depths and soft targets, as MiniDisc has
them. Two engines learn in one process, in alternating order on the same batches: a student of the
teacher's shape, and what a trial of MiniDisc trains, the widest candidate with all the others as
views of its weights (`--whole`: a model of the teacher's shape with all of them as views). Both
take whole steps of megakd's trainer: teacher, losses, backward, update.

CPU time is that of all threads of a rank; a pair's ratio is of the mean over the ranks.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml
from launching import start_ranks
from machine import markdown_row, print_row, spread_of
from options import fractions, integers
from overhead_case import case_config, write_case
from timed_ranks import read, run_rank, timed

from megakd.contract.stage import Constant, Pass, Stage
from megakd.engine.distributed import Ranks
from megakd.engine.student import device_batch
from megakd.inputs.inputs import prepare
from megakd.methods.minidisc import Sandwich
from megakd.pruning.store import shape_of_cut, unscored
from megakd.run.lab import Lab
from megakd.training.progress import Reporter
from megakd.training.stage_run import StageRun

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megakd.config.run import RunConfig
    from megakd.contract.views import View

TARGETS = {0: 1.75, 2: 1.75, 3: 2.1}
TARGET_SIZE = ("6x384", 16, 64)
"""What the targets are about; in smaller models what a step costs is not in the matrices."""
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Pair(NamedTuple):
    """Seconds of CPU time of one rank, the same batch taken through both steps."""

    sandwich: float
    plain: float


def main(arguments: Sequence[str]) -> int:
    """Measures each ZeRO stage with ranks of its own, or is one of them."""
    given = parse(arguments)
    if given.case is not None:
        run_rank(given, measured)
        return 0
    for stage in given.stages:
        with tempfile.TemporaryDirectory(prefix="megakd-sandwich-") as name:
            folder = Path(name)
            write_run(folder, given, stage)
            code = start_ranks(Path(__file__), [*arguments, "--case", name], given.ranks)
            if code != 0:
                return code
            show([list(map(Pair._make, rank)) for rank in read(folder)], given, stage)
    return 0


def write_run(folder: Path, given: argparse.Namespace, stage: int) -> None:
    """The overhead's case with other losses, no dropout, and a student of the teacher's shape."""
    given.student, given.deepspeed = given.teacher, f"zero{stage}"
    write_case(folder, given)
    tree = case_config(folder, given)
    layers = tree["student"]["model"]["config"]["num_hidden_layers"]
    depths = dict.fromkeys(round(index * layers / 6) for index in range(7))
    pairs = [f"{depth}:{depth}" for depth in depths]
    tree["objective"] = [
        {"loss": "hidden_mse", "weight": 0.5, "layer_mapping": pairs},
        {"loss": "soft_target_kl", "weight": 0.5},
    ]
    for role in ("teacher", "student"):
        tree[role]["model"]["config"] |= NO_DROPOUT
    # Other weights: a student that is its teacher would have no gradient.
    tree["teacher"]["model"]["config"]["initializer_range"] = 0.03
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def measured(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> list[Pair]:
    """This rank's pairs, without those of the warm-up."""
    prepared = prepare(config)
    reporter = Reporter(config.output_dir, is_main=ranks.is_main)
    lab = Lab(config, prepared, ranks, reporter)
    name = lab.teacher()
    ranked = unscored(prepared.sources["student"])
    views = {
        f"{sparsity:g}": ranked.view_at(sparsity, allocation="global", round_to=8)
        for sparsity in given.grid
    }
    stages = [stage_of(config, name, views, given), stage_of(config, name, {}, given)]
    if not given.whole:
        widest = next(iter(views.values()))
        start = shape_of_cut(ranked.source, widest, config.task.type)
        stages[0] = replace(stages[0], start=start)
    teacher = lab.pool.open(name, stages[1])
    assembly = lab.assembly  # knows the teachers that are ready
    runs = [
        StageRun(stage, assembly, teachers={name: teacher}, reporter=reporter, fingerprint={})
        for stage in stages
    ]
    try:
        return alternated(runs, given)
    finally:
        for run in runs:
            run.close()
        teacher.destroy()


def stage_of(
    config: RunConfig, teacher: str, views: Mapping[str, View], given: argparse.Namespace
) -> Stage:
    """A trial of all candidates as MiniDisc plans it; without views a plain distillation."""
    plain = Constant((Pass(teacher=teacher),))
    return Stage(
        name="sandwich" if views else "plain",
        teachers=(teacher,),
        objective=config.objective or (),
        strategy=Sandwich(teacher, tuple(views)) if views else plain,
        train=config.train,
        deepspeed=config.student.deepspeed,
        views=views,
        passes_per_backward=given.passes_per_backward,
    )


def alternated(runs: Sequence[StageRun], given: argparse.Namespace) -> list[Pair]:
    """Both steps by turns; who goes first changes with every pair."""
    sandwich, plain = runs
    pairs = []
    for index in range(given.warm_up + given.pairs):
        batches = [device_batch(b, plain.ranks.device) for b in plain.source.step(index)]
        first = timed(sandwich, batches) if index % 2 else None
        plain_seconds = timed(plain, batches)
        pairs.append(Pair(first or timed(sandwich, batches), plain_seconds))
    return pairs[given.warm_up :]


def show(by_rank: Sequence[Sequence[Pair]], given: argparse.Namespace, stage: int) -> None:
    """The numbers, and the row for docs/measurements.md."""
    columns = list(zip(*by_rank, strict=True))
    ratios = {
        "mean of ranks": [sum(p.sandwich for p in c) / sum(p.plain for p in c) for c in columns],
        "rank 0": [pair.sandwich / pair.plain for pair in by_rank[0]],
    }
    for name, values in ratios.items():
        spread = spread_of(values)
        low, high = spread.interval
        print(f"ZeRO {stage}, {name}: {spread.median:.3f} (95 %: {low:.3f} to {high:.3f})")
    least = least_ratio(by_rank)
    spread = spread_of(ratios["mean of ranks"])
    steps = [spread_of([getattr(p, n) for p in by_rank[0]]).median * 1000 for n in Pair._fields]
    print(
        f"  of the fastest steps: {least:.3f}; a step of rank 0: {steps[0]:.0f} against "
        f"{steps[1]:.0f} ms"
    )
    target = TARGETS.get(stage)
    if target is not None and (given.teacher, given.rows, given.length) == TARGET_SIZE:
        print(f"  target {target}: {'met' if spread.median <= target else 'missed'}")
    what = f"sandwich of {len(given.grid)} against a plain step, ZeRO {stage}, "
    what += f"{given.ranks} rank(s), {given.teacher}, {given.rows} x {given.length} tokens"
    numbers = f"CPU time {spread.median:.2f}, of the fastest steps {least:.2f}"
    low, high = spread.interval
    row = markdown_row(what, given.command, numbers, f"95 %: {low:.2f} to {high:.2f}")
    print_row(row)


def least_ratio(by_rank: Sequence[Sequence[Pair]]) -> float:
    """The fastest sandwich step over the fastest plain one, summed over the ranks."""
    least = [sum(min(getattr(p, n) for p in rank) for rank in by_rank) for n in Pair._fields]
    return least[0] / least[1]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; sizes are layers x width."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--stages", type=integers, default=[0, 2, 3], help="ZeRO's, of the student")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2, help="pairs that do not count")
    parser.add_argument("--grid", type=fractions, default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--whole", action="store_true", help="of the sandwich: see above")
    parser.add_argument("--passes-per-backward", type=int, help="default: all in one")
    parser.add_argument("--teacher", default="6x384", help="both models, heads of 32")
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--rows", type=int, default=16, help="of each rank's batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of every row")
    parser.add_argument("--teacher-deepspeed", default="teacher_zero0", help="the teacher's preset")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.command = shlex.join(["python", "benchmarks/sandwich.py", *arguments])
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
