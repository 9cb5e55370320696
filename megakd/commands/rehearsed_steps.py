"""The first steps of a run's student: labels that count, memory beside the plan, and growth."""

from __future__ import annotations

import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from megakd.config.run import RunConfig
from megakd.contract.batch import IGNORE, Batch
from megakd.contract.stage import Stage, StageResult
from megakd.contract.tasks import STUDENT
from megakd.engine.collectives import all_reduce_, gather, node_name, on_main
from megakd.engine.distributed import Ranks
from megakd.engine.memory import peak_memory_bytes, reset_peak_memory
from megakd.errors import MegakdError
from megakd.inputs.inputs import RunInputs
from megakd.planning.cluster import GIGA, Cluster
from megakd.planning.plan import plan_run
from megakd.run.run_lab import RunLab
from megakd.storage.fingerprint import Fingerprint
from megakd.training.progress import Reporter
from megakd.training.stage_run import StageRun

SETTLED = 20
"""Steps after which memory should not grow any more."""
GROWTH_BYTES, GROWTH = 64_000_000, 0.05
"""Growth that is told: more than both; the second is a share of the memory in use."""
UNPLANNED = 1.15
"""Memory that is told, as a multiple of the plan."""
logger = logging.getLogger(__name__)


@dataclass
class Rehearsed(Exception):  # noqa: N818 - it ends the method, which has no result to go on with
    """The steps that were taken.

    labelled, positions: tokens (or rows) with a loss, and all of them, over all ranks.
    empty, rows: rows without a loss, and all rows, over all ranks.
    peak: bytes that the steps took, of the rank with the most.
    growth: bytes in use at the end less those after `SETTLED` steps, of the rank with the most.
    held: bytes in use at the end, of this rank. saved: bytes of a checkpoint, of all ranks.
    """

    stage: str
    total_steps: int
    steps: int
    seconds: float
    labelled: int
    positions: int
    empty: int
    rows: int
    peak: int
    growth: int
    held: int
    saved: int


class RehearsingLab(RunLab):
    """A lab that takes the first steps of the first stage of the student, and then raises them.

    Models that are trained before take a single step.
    """

    def __init__(
        self, prepared: RunInputs, ranks: Ranks, reporter: Reporter, *, steps: int
    ) -> None:
        super().__init__(prepared, ranks, reporter)
        self._steps = steps

    def _run(self, stage: Stage, fingerprint: Fingerprint, folder: Path) -> StageResult:
        train = replace(stage.train, resume_from_checkpoint=True)
        if stage.role != STUDENT:
            train = replace(train, max_steps=1)
        return super()._run(replace(stage, train=train), fingerprint, folder)

    def _result(self, run: StageRun, folder: Path) -> StageResult:
        if run.stage.role != STUDENT:
            return super()._result(run, folder)
        raise self._rehearsed(run)

    def _rehearsed(self, run: StageRun) -> Rehearsed:
        device = self._ranks.device
        counts, held, began = torch.zeros(4, dtype=torch.long, device=device), 0, time.monotonic()
        reset_peak_memory(device)
        run.stage.strategy.begin(run.student, 0)
        steps = min(self._steps, run.steps)
        with closing(run.batches(0)) as every:
            for step, batches in enumerate(itertools.islice(every, steps), start=1):
                counts += sum(_counts(batch) for batch in batches)
                run.trainer.train_step(batches)
                if step == SETTLED:
                    held = _held(device)
        labelled, positions, empty, rows = all_reduce_(counts).tolist()
        now = _held(device)
        parts = run.student.optimizer_state.parts()
        saved = sum(part.nbytes for by_name in parts.values() for part in by_name.values())
        return Rehearsed(
            stage=run.stage.name,
            total_steps=run.steps,
            steps=steps,
            seconds=time.monotonic() - began,
            labelled=labelled,
            positions=positions,
            empty=empty,
            rows=rows,
            peak=max(gather(peak_memory_bytes(device))),
            growth=max(gather(now - held if held else 0)),
            held=now,
            saved=sum(gather(saved)),
        )


def step_findings(taken: Rehearsed, config: RunConfig, ranks: Ranks) -> Iterator[str]:
    """Yield what is fine with the steps, and log warnings of the rest; a collective.

    Raises:
        MegakdError: the disk cannot hold the checkpoints.
    """
    seconds = taken.seconds / taken.steps
    yield f"{taken.steps} steps of {taken.stage}, {seconds:.2f} s each"
    yield from _labels(taken)
    yield from _memory(taken, config, ranks)
    yield from on_main(lambda: [_disk(taken, config)])


def _labels(taken: Rehearsed) -> Iterator[str]:
    what = "rows" if taken.positions == taken.rows else "tokens"
    share = f"{taken.labelled:,} of {taken.positions:,} {what} carry a loss on labels"
    if not taken.labelled:
        logger.warning("%s: only terms without labels learn; check the labels of the rows", share)
        return
    yield share
    if taken.empty and what == "tokens":
        logger.warning(
            "%d of %d rows have no token with a loss: they are too short, or truncation leaves "
            "nothing of the answer; raise task.max_length or remove them",
            *(taken.empty, taken.rows),
        )


def _memory(taken: Rehearsed, config: RunConfig, ranks: Ranks) -> Iterator[str]:
    nodes = len({*gather(node_name())})
    device = "cuda" if ranks.device.type == "cuda" else "cpu"
    cluster = Cluster(ranks=ranks.world_size, nodes=nodes, device=device)
    plan = on_main(lambda: plan_run(config, cluster, advise=False).as_json())
    of_stage = next(phase for phase in plan["phases"] if phase["name"] == taken.stage)
    base = plan["host_base_bytes"] if device == "cpu" else 0
    planned = of_stage["peak_bytes_per_rank"] + base
    told = f"the steps take {taken.peak / GIGA:.2f} GB per rank, and the plan says "
    told += f"{planned / GIGA:.2f} GB"
    if taken.peak > UNPLANNED * planned:
        logger.warning("%s: leave room for the difference", told)
    else:
        yield told
    if taken.growth > max(GROWTH_BYTES, GROWTH * taken.held):
        logger.warning(
            "memory has grown by %.2f GB in %d steps and may go on: look for a list that keeps "
            "tensors in code of your own, or report it",
            *(taken.growth / GIGA, taken.steps - SETTLED),
        )
    elif taken.steps > SETTLED:
        yield f"memory is the same after {SETTLED} and {taken.steps} steps"


def _disk(taken: Rehearsed, config: RunConfig) -> str:
    limit, every = config.save.save_total_limit, config.save.save_steps
    count = (taken.total_steps // every if limit is None else limit) + 1
    needed, free = count * taken.saved, shutil.disk_usage(config.output_dir).free
    told = f"checkpoints of {taken.stage} take {needed / GIGA:.2f} GB of the disk ({count} at most)"
    if needed > free:
        raise MegakdError(
            f"{told}, and {free / GIGA:.2f} GB are free; free some space, choose another "
            "output_dir, or lower save.save_total_limit"
        )
    return told


def _counts(batch: Batch) -> Tensor:
    """Return the labelled and all positions, and the rows without a label and all rows, [4]."""
    labels, real = batch.labels, batch.valid.any(dim=-1)
    is_labelled = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE
    by_row = is_labelled.reshape(len(labels), -1).any(dim=-1)
    positions = batch.valid if labels.dim() > 1 else real
    pairs = (is_labelled, positions, real & ~by_row, real)
    return torch.stack([part.sum() for part in pairs])


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
