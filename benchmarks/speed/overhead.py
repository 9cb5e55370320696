"""Overhead of megakd in a training step, against a bare loop with the same engines and batch.

`python benchmarks speed.overhead [--ranks 2] [--pairs 100]`, on CPU ranks.

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
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import stages
from lib.clocks import Clocks, by_turns, line, over_ranks, timed
from lib.launching import BENCHMARKS, start_ranks
from lib.options import parsed
from lib.tables import Spread, print_rows, ratio_of, spread_of
from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.data.batch import Batch, Outputs, Pass
from megakd.data.loader import STEPS_AHEAD, STEPS_AT_ONCE
from megakd.engine.collectives import gather
from megakd.engine.distributed import Ranks
from megakd.losses.bundle import StudentBundle
from megakd.run.main import started
from megakd.teachers.frozen import FrozenModel, FrozenTeacher
from megakd.training.stage_run import StageRun
from megakd.training.student import device_batch

TARGET = 1.02
MEASURED = "measured.json"


class BareTeacher(FrozenModel):
    """The frozen model that also answers a bare loop: logits and nothing else."""

    def forward(self, batch: Batch, *, scoring: bool = False, bare: bool = False) -> Any:
        """Return logits [B, C] if `bare`, else what megakd asks for."""
        if bare:
            return self.model(**batch.inputs).logits
        return super().forward(batch, scoring=scoring)


class BareStudent(StudentBundle):
    """The bundle that also computes the bare loop's loss in the engine's forward."""

    def forward(
        self,
        batch: Batch,
        knowledge: Mapping[str, Outputs] | None = None,
        plan: Sequence[Pass] | None = None,
        counts: Tensor | None = None,
        soft: Tensor | None = None,
        *,
        view: str | None = None,
    ) -> Any:
        """Return the hand-written loss for a teacher's logits, else what megakd asks for."""
        if soft is None:
            return super().forward(batch, knowledge, plan, counts, view=view)
        logits = self.student(**batch.inputs).logits
        divergence = F.kl_div(
            F.log_softmax(logits / stages.TEMPERATURE, dim=-1),
            F.softmax(soft / stages.TEMPERATURE, dim=-1),
            reduction="batchmean",
        )
        hard = stages.WEIGHTS["hard_cross_entropy"] * F.cross_entropy(logits, batch.labels)
        return hard + stages.WEIGHTS["soft_target_kl"] * stages.TEMPERATURE**2 * divergence


class BareLoop:
    """A bare loop with the same engines."""

    def __init__(self, stage: StageRun, teacher: FrozenTeacher) -> None:
        self._student = stage.student._engine  # noqa: SLF001 - the engine is what is shared
        self._teacher = teacher._engine  # noqa: SLF001
        self._student.module.__class__ = BareStudent
        self._teacher.module.__class__ = BareTeacher
        self._student.train()

    def step(self, batch: Batch) -> None:
        with torch.no_grad():
            soft = self._teacher(batch, bare=True)
        loss = self._student(batch, soft=soft)
        self._student.backward(loss)
        self._student.step()


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        run_rank(given)
        return 0
    with tempfile.TemporaryDirectory(prefix="megakd-steps-") as name:
        stages.write_case(Path(name), given)
        start_ranks([str(BENCHMARKS), __name__, *given.arguments, "--case", name], given.ranks)
        by_rank = json.loads((Path(name) / MEASURED).read_text(encoding="utf-8"))
    pairs = over_ranks([rank["pairs"] for rank in by_rank])
    show(pairs, max(rank["share"] for rank in by_rank), given)
    return 0


def run_rank(given: argparse.Namespace) -> None:
    """Measure on one rank, in the folder of the case; rank 0 writes what all have measured."""
    config = load_config(given.case / "run.yaml")
    with started(config) as ranks:
        measured = gather(measure(config, ranks, given))
        if ranks.is_main:
            (given.case / MEASURED).write_text(json.dumps(measured), encoding="utf-8")


def measure(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> dict[str, Any]:
    with stages.measured_stage(config, ranks) as (stage, teacher):
        bare = BareLoop(stage, teacher)
        count = given.warm_up + given.pairs
        batches = [device_batch(stage.batch_source.step(i)[0], ranks.device) for i in range(count)]
        stage.watched.forget()
        steps = stage.steps_one_by_one()
        sides = [
            lambda index: timed(partial(megakd_step, stage, steps, index)),
            lambda index: timed(partial(bare.step, batches[index])),
        ]
        pairs = by_turns(sides, given.pairs, warm_up=given.warm_up)
        return {"pairs": pairs, "share": data_share(stage, steps, given.alone)}


def megakd_step(stage: stages.MeasuredStage, steps: Iterator[None], index: int) -> None:
    """Take the next step of a stage, and wait until its loader is idle."""
    next(steps)
    # The first of a run of steps gives the loader the next run.
    stage.watched.wait_for(STEPS_AHEAD + STEPS_AT_ONCE * (1 + index // STEPS_AT_ONCE))


def data_share(stage: StageRun, steps: Iterator[None], count: int) -> float:
    """Return the share of wall-clock that steps as a run takes them wait for their data."""
    waited, began = stage.batch_source.waited_s, time.perf_counter()
    for _ in range(count):
        next(steps)
    return (stage.batch_source.waited_s - waited) / (time.perf_counter() - began)


def show(pairs: Sequence[Sequence[Clocks]], share: float, given: argparse.Namespace) -> None:
    ratios = dict[str, Spread]()
    for clock in Clocks._fields:
        ours, bare = ([getattr(pair[side], clock) for pair in pairs] for side in (0, 1))
        ratios[clock] = ratio_of(list(zip(ours, bare, strict=True)))
        step = spread_of(bare).median * 1000
        added = spread_of([a - b for a, b in zip(ours, bare, strict=True)]).median * 1000
        print(f"{clock}: {line(ratios[clock])}; all steps together {sum(ours) / sum(bare):.4f}")
        print(f"  a bare step takes {step:.1f} ms, megakd adds {added:.2f} ms")
        print(f"  bare against the next bare: {line(ratio_of(list(itertools.pairwise(bare))))}")
    print(f"waiting for data: {share:.2%} of the step")
    within = max(ratio.median for ratio in ratios.values()) <= TARGET
    print(f"target {TARGET}: {'met' if within else 'missed'}")
    what = f"step against a bare loop, {given.ranks} rank(s), {len(pairs)} pairs"
    what += f", teacher {given.teacher}, student {given.student}"
    cpu, wall = ratios["cpu"], ratios["wall"]
    numbers = f"CPU time {cpu.median:.3f}, wall {wall.median:.3f}, data wait {share:.2%}"
    print_rows(given.command, (what, numbers, f"95 %: CPU {cpu.between()}, wall {wall.between()}"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = stages.step_parser(__doc__, ranks=1, pairs=100, warm_up=10, student="2x128")
    parser.add_argument("--alone", type=int, default=50, help="steps that measure the data wait")
    return parsed(parser, __name__, arguments)
