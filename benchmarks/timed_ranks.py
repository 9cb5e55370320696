"""Shared parts of the benchmarks that time whole steps on several ranks."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megakd.config.file import load_config
from megakd.engine.collectives import gather
from megakd.run.main import started

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from megakd.config.run import RunConfig
    from megakd.contract.batch import Batch
    from megakd.engine.distributed import Ranks
    from megakd.training.stage_run import StageRun

    Measure = Callable[[RunConfig, Ranks, argparse.Namespace], Sequence[Any]]


def run_rank(given: argparse.Namespace, measured: Measure) -> None:
    """One rank's part, in the folder that holds the case; rank 0 writes what all have measured."""
    config = load_config(given.case / "run.yaml")
    with started(config) as ranks:
        found = gather(measured(config, ranks, given))
        if ranks.is_main:
            (given.case / "measured.json").write_text(json.dumps(found), encoding="utf-8")


def read(folder: Path) -> Any:
    """The measurements of all ranks."""
    return json.loads((folder / "measured.json").read_text(encoding="utf-8"))


def timed(run: StageRun, batches: Sequence[Batch]) -> float:
    """CPU seconds of one whole step, which all ranks begin together."""
    dist.barrier()
    began = time.process_time()
    run.trainer.train_step(batches)
    return time.process_time() - began
