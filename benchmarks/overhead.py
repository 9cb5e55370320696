"""Overhead of megakd in a training step, against a bare loop with the same engines and batch.

`python benchmarks/overhead.py [--ranks 2] [--pairs 100] [--profile]`, on CPU ranks.

A pair is one step of each loop on the same batch, in one process and in alternating order:

* megakd: all that a stage does per step: the loader with its thread, the move to the device, unit
  counts, teacher, losses with top-1 agreement, backward, update, health, reporter, and a line of
  metrics.jsonl and TensorBoard at every tenth step.
* bare: teacher engine, student engine with a hand-written loss, backward, step; nothing else.

The clock of a megakd step runs until its loader's thread is idle again, so that none of its work
is counted with the bare step. CPU time is that of all threads and ranks together; wall-clock that
of the slowest rank. Steps without a bare loop between them then give the share of waiting for data.
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import pstats
import shlex
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from launching import start_ranks
from machine import Spread, markdown_row, print_row, spread_of
from overhead_case import TEMPERATURE, WEIGHTS, write_case

from megakd.config.file import load_config
from megakd.contract.batch import Batch, Knowledge
from megakd.contract.stage import Constant, Pass, Stage
from megakd.data.loader import STEPS_AHEAD
from megakd.engine.collectives import gather
from megakd.engine.distributed import Ranks
from megakd.engine.student import device_batch
from megakd.inputs.inputs import prepare
from megakd.losses.bundle import StudentBundle
from megakd.run.lab import Lab
from megakd.run.main import started
from megakd.teachers.frozen import FrozenModel, FrozenTeacher
from megakd.training.progress import Reporter
from megakd.training.stage_run import StageRun

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from megakd.config.run import RunConfig

TARGET = 1.03


class Clocks(NamedTuple):
    """Seconds of one step: CPU time of the threads, and wall-clock."""

    cpu: float
    wall: float


class Pair(NamedTuple):
    """Run one batch through both loops."""

    megakd: Clocks
    bare: Clocks


class BareTeacher(FrozenModel):
    """The frozen model that also answers a bare loop: logits and nothing else."""

    def forward(self, batch: Batch, *, scoring: bool = False, bare: bool = False) -> Any:
        """Logits [B, C] if `bare`, else what megakd asks for."""
        if bare:
            return self.model(**batch.inputs).logits
        return super().forward(batch, scoring=scoring)


class BareStudent(StudentBundle):
    """The bundle that also computes the bare loop's loss in the engine's forward."""

    def forward(
        self,
        batch: Batch,
        knowledge: Mapping[str, Knowledge] | None = None,
        plan: Sequence[Pass] | None = None,
        counts: Tensor | None = None,
        soft: Tensor | None = None,
        *,
        view: str | None = None,
    ) -> Any:
        """The hand-written loss if there are teacher's logits, else what megakd asks for."""
        if soft is None:
            return super().forward(batch, knowledge, plan, counts, view=view)
        logits = self.student(**batch.inputs).logits
        divergence = F.kl_div(
            F.log_softmax(logits / TEMPERATURE, dim=-1),
            F.softmax(soft / TEMPERATURE, dim=-1),
            reduction="batchmean",
        )
        hard = WEIGHTS["hard_cross_entropy"] * F.cross_entropy(logits, batch.labels)
        return hard + WEIGHTS["soft_target_kl"] * TEMPERATURE**2 * divergence


class WatchedCollate:
    """Counts the batches that are made, so that one can wait for the loader's thread."""

    def __init__(self, collate: Callable[..., Batch]) -> None:
        self._collate, self._made = collate, 0
        self._changed = threading.Condition()

    def __call__(self, rows: object, *, dummy_rows: int = 0) -> Batch:
        """Pads and joins."""
        batch = self._collate(rows, dummy_rows=dummy_rows)
        with self._changed:
            self._made += 1
            self._changed.notify_all()
        return batch

    def forget(self) -> None:
        """Counts from 0 again."""
        self._made = 0

    def wait_for(self, batches: int) -> None:
        """Blocks until so many are made."""
        with self._changed:
            self._changed.wait_for(lambda: self._made >= batches)


class MeasuredStage(StageRun):
    """A stage whose loop hands over after every step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        loader: Any = self.source
        self.watched = loader._collate = WatchedCollate(loader._collate)  # noqa: SLF001

    def steps_one_by_one(self) -> Iterator[None]:
        """Run the body of `run` between the start and the end of a stage."""
        if self.ranks.is_main:
            self.reporter.begin(self.stage.name, self.extent(0))
        self.health.begin()
        for report in self.trainer.fit(self._on_device(0)):
            self._after_step(report)
            yield


class BareLoop:
    """A bare loop with the same engines."""

    def __init__(self, stage: StageRun, teacher: FrozenTeacher) -> None:
        self._student = stage.student._engine  # noqa: SLF001 - the engine is what is shared
        self._teacher = teacher._engine  # noqa: SLF001
        self._student.module.__class__ = BareStudent
        self._teacher.module.__class__ = BareTeacher
        self._student.train()

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        with torch.no_grad():
            soft = self._teacher(batch, bare=True)
        loss = self._student(batch, soft=soft)
        self._student.backward(loss)
        self._student.step()


class Measured(NamedTuple):
    """pairs: over all ranks. data_share: of the steps' wall-clock, waited for data."""

    pairs: Sequence[Pair]
    data_share: float


def measure(stage: MeasuredStage, bare: BareLoop, given: argparse.Namespace) -> Measured:
    """Pairs of steps, then steps of megakd alone."""
    total = given.warm_up + given.pairs
    batches = [device_batch(stage.source.step(i)[0], stage.ranks.device) for i in range(total)]
    stage.watched.forget()
    steps = stage.steps_one_by_one()
    profile = cProfile.Profile() if given.profile and stage.ranks.is_main else None
    pairs = []
    for index, batch in enumerate(batches):

        def megakd_step(index: int = index) -> None:
            next(steps)
            stage.watched.wait_for(index + 1 + STEPS_AHEAD)

        def bare_step(batch: Batch = batch) -> None:
            bare.step(batch)

        in_profile = profile if index >= given.warm_up else None
        pairs.append(timed_pair(megakd_step, bare_step, megakd_first=index % 2 == 0, of=in_profile))
    if profile is not None:
        statistics = pstats.Stats(profile)
        statistics.sort_stats("tottime").print_stats(15)
        statistics.sort_stats("cumtime").print_stats("megakd")
        print("the profile slows megakd's steps down: the ratios below say nothing")
    joined = [over_ranks(same) for same in zip(*gather(pairs[given.warm_up :]), strict=True)]
    return Measured(joined, data_share(stage, steps, given.alone))


def timed_pair(
    megakd_step: Callable[[], None],
    bare_step: Callable[[], None],
    *,
    megakd_first: bool,
    of: cProfile.Profile | None,
) -> Pair:
    """Both steps, one after the other; only megakd's is profiled."""
    bare = None if megakd_first else timed(bare_step)
    megakd = timed(megakd_step if of is None else lambda: of.runcall(megakd_step))
    return Pair(megakd, timed(bare_step) if bare is None else bare)


def timed(action: Callable[[], None]) -> Clocks:
    """The clocks of one action, which all ranks begin together."""
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return Clocks(time.process_time() - cpu, time.perf_counter() - wall)


def over_ranks(same: Sequence[Pair]) -> Pair:
    """One pair of all ranks: CPU time together, wall-clock of the slowest."""

    def joined(clocks: Sequence[Clocks]) -> Clocks:
        return Clocks(sum(c.cpu for c in clocks), max(c.wall for c in clocks))

    return Pair(joined([p.megakd for p in same]), joined([p.bare for p in same]))


def data_share(stage: StageRun, steps: Iterator[None], count: int) -> float:
    """The share of wall-clock that steps as a run takes them wait for their data."""
    waited, began = stage.source.waited_s, time.perf_counter()
    for _ in range(count):
        next(steps)
    elapsed = time.perf_counter() - began
    return max(gather((stage.source.waited_s - waited) / elapsed))


def run_rank(given: argparse.Namespace) -> None:
    """One rank's part, in the folder that holds the case."""
    config = load_config(given.case / "run.yaml")
    with started(config) as ranks:
        stage, teacher = build(config, ranks)
        try:
            measured = measure(stage, BareLoop(stage, teacher), given)
        finally:
            stage.close()
            teacher.destroy()
        if ranks.is_main:
            show(measured, given)


def build(config: RunConfig, ranks: Ranks) -> tuple[MeasuredStage, FrozenTeacher]:
    """The stage as `single` plans it, and its teacher."""
    prepared = prepare(config)
    reporter = Reporter(config.output_dir, is_main=ranks.is_main)
    lab = Lab(config, prepared, ranks, reporter)
    name = lab.teacher()
    stage = Stage(
        name="student",
        teachers=(name,),
        objective=config.objective or (),
        strategy=Constant((Pass(teacher=name),)),
        train=config.train,
        deepspeed=config.student.deepspeed,
    )
    assembly = lab.assembly  # knows the teachers that are ready
    teacher = lab.pool.open(name, stage)
    teachers = {name: teacher}
    return MeasuredStage(
        stage, assembly, teachers=teachers, reporter=reporter, fingerprint={}
    ), teacher


def show(measured: Measured, given: argparse.Namespace) -> None:
    """The numbers, and the row for docs/measurements.md."""
    pairs = measured.pairs
    rows = {}
    for clock in Clocks._fields:
        ours = [getattr(pair.megakd, clock) for pair in pairs]
        bare = [getattr(pair.bare, clock) for pair in pairs]
        rows[clock] = spread_of([a / b for a, b in zip(ours, bare, strict=True)])
        same = spread_of([a / b for a, b in itertools.pairwise(bare)])
        step = spread_of(bare).median * 1000
        added = spread_of([a - b for a, b in zip(ours, bare, strict=True)]).median * 1000
        print(f"{clock}: {line(rows[clock])}; all steps together {sum(ours) / sum(bare):.4f}")
        print(f"  a bare step takes {step:.1f} ms, megakd adds {added:.2f} ms")
        print(f"  bare against the next bare: {line(same)}")
    print(f"waiting for data: {measured.data_share:.2%} of the step")
    within = max(rows["cpu"].median, rows["wall"].median) <= TARGET
    print(f"target {TARGET}: {'met' if within else 'missed'}")
    what = f"step against a bare loop, {given.ranks} rank(s), {len(pairs)} pairs"
    what += f", teacher {given.teacher}, student {given.student}"
    numbers = f"CPU time {rows['cpu'].median:.3f}, wall {rows['wall'].median:.3f}"
    numbers += f", data wait {measured.data_share:.2%}"
    spread = f"95 %: CPU {interval(rows['cpu'])}, wall {interval(rows['wall'])}"
    print_row(markdown_row(what, given.command, numbers, spread))


def line(spread: Spread) -> str:
    """A ratio with its spread."""
    low, high = spread.quartiles
    return f"{spread.median:.4f} (quartiles {low:.4f} to {high:.4f}, 95 % {interval(spread)})"


def interval(spread: Spread) -> str:
    """The bootstrap interval."""
    return f"{spread.interval[0]:.3f} to {spread.interval[1]:.3f}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; sizes are layers x width."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=10, help="pairs that do not count")
    parser.add_argument("--alone", type=int, default=50, help="steps that measure the data wait")
    parser.add_argument("--teacher", default="6x384")
    parser.add_argument("--student", default="2x128")
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--rows", type=int, default=16, help="of each rank's batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of every row")
    parser.add_argument("--deepspeed", default="zero2", help="the student's preset")
    parser.add_argument("--teacher-deepspeed", default="teacher_zero3", help="the teacher's preset")
    parser.add_argument("--profile", action="store_true", help="show where megakd's steps spend")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    shown = arguments[: arguments.index("--case")] if given.case else arguments
    given.command = shlex.join(["python", "benchmarks/overhead.py", *shown])
    return given


def main(arguments: Sequence[str]) -> int:
    """Starts the ranks, or is one of them."""
    given = parse(arguments)
    if given.case is not None:
        run_rank(given)
        return 0
    with tempfile.TemporaryDirectory(prefix="megakd-overhead-") as name:
        write_case(Path(name), given)
        return start_ranks(Path(__file__), [*arguments, "--case", name], given.ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
