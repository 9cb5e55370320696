"""Cost of the student's part of a HomoDistil step: before a cut, masked, and after the cut.

`python benchmarks/homodistil_steps.py [--pairs 30] [--ranks 1]`, on the CPU.

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
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import yaml
from launching import start_ranks
from machine import markdown_row, print_row, spread_of
from overhead_case import case_config, write_case
from timed_ranks import read, run_rank

from megakd.contract.stage import Constant, Pass, Stage
from megakd.contract.tasks import STUDENT
from megakd.engine.student import device_batch
from megakd.inputs.inputs import prepare
from megakd.methods.homodistil.pruning import cut_of, everything, select
from megakd.methods.homodistil.schedule import Shares, Target
from megakd.methods.homodistil.sensitivity import Averages, group_sizes, update_averages
from megakd.pruning.store import shape_of_cut
from megakd.run.lab import Lab
from megakd.training.progress import Reporter
from megakd.training.recipes import label_terms
from megakd.training.stage_run import StageRun

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megakd.config.run import RunConfig
    from megakd.contract.batch import Batch
    from megakd.contract.views import View
    from megakd.engine.distributed import Ranks

TARGET = 0.25
TARGET_SIZE = ("6x384", 0.25)
SIDES = ("whole", "masked", "cut")
RATE = 1e-4
Clocks = tuple[float, float]
"""CPU seconds of a step, and of the sensitivities beside it."""


def main(arguments: Sequence[str]) -> int:
    """Starts the ranks and prints what they have measured, or is one of them."""
    given = parse(arguments)
    if given.case is not None:
        torch.set_num_threads(given.threads)
        run_rank(given, measured)
        return 0
    with tempfile.TemporaryDirectory(prefix="megakd-homodistil-") as name:
        write_run(Path(name), given)
        code = start_ranks(Path(__file__), [*arguments, "--case", name], given.ranks)
        if code == 0:
            show(read(Path(name)), given)
    return code


def write_run(folder: Path, given: argparse.Namespace) -> None:
    """The overhead's case as masked language modelling, without a teacher."""
    write_case(folder, given)
    tree = case_config(folder, given)
    for unused in ("teacher", "objective"):
        del tree[unused]
    del tree["task"]["label_column"]
    tree["task"]["type"] = "mlm"
    tree["method"] = {"name": "finetune"}
    heads = {"num_attention_heads": given.heads, "max_position_embeddings": given.length}
    tree["student"]["model"]["config"] |= heads
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def measured(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> list[Any]:
    """This rank's clocks of every round, without those of the warm-up."""
    reporter = Reporter(config.output_dir, is_main=ranks.is_main)
    prepared = prepare(config)
    lab = Lab(config, prepared, ranks, reporter)
    source = prepared.sources[STUDENT]
    whole = source.units
    goal = goal_of(whole, given.keep)
    starts = {
        "whole": (source, whole),
        "masked": (source, goal),
        "cut": (shape_of_cut(source, goal, config.task.type), goal),
    }
    stages = {name: stage_of(config, name, *start) for name, start in starts.items()}
    runs = {
        name: StageRun(stage, lab.assembly, teachers={}, reporter=reporter, fingerprint={})
        for name, stage in stages.items()
    }
    try:
        mask(runs["masked"].student, goal)
        return rounds(runs, given)
    finally:
        for run in runs.values():
            run.close()


def goal_of(whole: View, share: float) -> View:
    """The units of the student: the same share of every kind, and all heads."""
    part = Fraction(str(share))
    return Target(whole, Shares(Fraction(1), part, part, part)).goal


@dataclass(frozen=True, kw_only=True)
class PrunedTo(Constant):
    """One pass without a teacher, of a student that `mask` prunes."""

    left: View

    @property
    def pruned_to(self) -> View:
        """The units that are left."""
        return self.left


def stage_of(config: RunConfig, name: str, start: Any, left: View) -> Stage:
    """A stage whose student may be pruned while it learns from the masked tokens."""
    return Stage(
        name=name,
        objective=label_terms(config),
        start=start,
        train=config.train,
        deepspeed=config.student.deepspeed,
        strategy=PrunedTo(left=left),
    )


def mask(student: Any, goal: View) -> None:
    """Keep units that were chosen at random, as HomoDistil keeps the most sensitive ones."""
    count = sum(group_sizes(student.makers, student.units).values())
    scores = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = select(scores, everything(student), goal, student, monotone=True)
    student.keep(cut_of(student, kept))


def rounds(runs: Mapping[str, StageRun], given: argparse.Namespace) -> list[dict[str, Clocks]]:
    """One step of every side per round; who goes first changes with every round."""
    first = runs["whole"]
    averages: dict[str, Averages] = {name: {} for name in runs}
    found = []
    for index in range(given.warm_up + given.pairs):
        (batch,) = (device_batch(b, first.ranks.device) for b in first.source.step(index))
        order = [SIDES[(index + place) % len(SIDES)] for place in range(len(SIDES))]
        found.append({name: timed_step(runs[name], batch, averages[name]) for name in order})
    return found[given.warm_up :]


def timed_step(run: StageRun, batch: Batch, averages: Averages) -> Clocks:
    """The clocks of one step, which all ranks begin together."""
    counts = run.trainer.count_units([batch])
    student = run.student
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
    """The ratios with their spread, and the row for docs/measurements.md."""
    columns = list(zip(*by_rank, strict=True))
    steps, averages = ({name: _sums(columns, name, place) for name in SIDES} for place in (0, 1))
    for name in SIDES:
        step, average = (1000 * spread_of(clock[name]).median for clock in (steps, averages))
        print(f"{name}: {step:.1f} ms of CPU time, sensitivities {average:.2f} ms")
    texts = {name: _ratio(steps[name], steps["whole"]) for name in SIDES[1:]}
    for name, (text, spread) in texts.items():
        print(f"{name} / whole: {text} (95 %: {spread})")
    both = {n: [a + b for a, b in zip(steps[n], averages[n], strict=True)] for n in SIDES}
    text, spread = _ratio(both["cut"], both["whole"])
    print(f"cut / whole with the sensitivities: {text} (95 %: {spread})")
    if (given.student, given.keep) == TARGET_SIZE:
        met = spread_of(_ratios(steps["cut"], steps["whole"])).median <= TARGET
        print(f"target {TARGET}: {'met' if met else 'missed'}")
    what = f"student's part of a step, {given.keep:.0%} of every width, {given.student}, "
    what += f"{given.ranks} rank(s), {given.rows} x {given.length} tokens, {given.deepspeed}"
    numbers = ", ".join(f"{name} {text}" for name, (text, _) in texts.items())
    spreads = ", ".join(f"{name} {spread}" for name, (_, spread) in texts.items())
    print_row(markdown_row(what, given.command, f"CPU time: {numbers}", f"95 %: {spreads}"))


def _sums(columns: Sequence[Sequence[Any]], name: str, place: int) -> list[float]:
    return [sum(rank[name][place] for rank in column) for column in columns]


def _ratios(ours: Sequence[float], whole: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, whole, strict=True)]


def _ratio(ours: Sequence[float], whole: Sequence[float]) -> tuple[str, str]:
    spread = spread_of(_ratios(ours, whole))
    return f"{spread.median:.3f}", f"{spread.interval[0]:.3f} to {spread.interval[1]:.3f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; sizes are layers x width."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of every rank")
    parser.add_argument("--pairs", type=int, default=30, help="rounds of one step of each side")
    parser.add_argument("--warm-up", type=int, default=4, help="rounds that do not count")
    parser.add_argument("--student", default="6x384")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--keep", type=float, default=0.25, help="share of every kind of units")
    parser.add_argument("--vocabulary", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16, help="of each rank's batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of every row")
    parser.add_argument("--deepspeed", default="zero2", help="the student's preset")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.quick:
        given.student, given.heads = "2x32", 4
        given.pairs, given.warm_up, given.rows, given.length = 3, 1, 2, 8
    # The case wants a teacher, which is not built.
    given.teacher, given.teacher_deepspeed = given.student, "teacher_zero0"
    given.command = shlex.join(["python", "benchmarks/homodistil_steps.py", *arguments])
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
