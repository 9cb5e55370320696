"""Examination of a run before it is started, in findings of one line each.

The machines: versions, compilers, folders and space, compared over the ranks. The first steps of
the student: labels that count, memory beside the plan, and growth.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

from megakd.config.checks.path_rules import check_paths
from megakd.config.models import TeacherConfig
from megakd.config.run import RunConfig
from megakd.contract.batch import IGNORE, Batch
from megakd.contract.stage import Stage, StageResult
from megakd.contract.tasks import AUTO, STUDENT
from megakd.engine import nodes
from megakd.engine.collectives import all_reduce_, gather, node_name, on_main, together
from megakd.engine.distributed import Ranks, use_own_extensions_folder
from megakd.engine.memory import free_memory_bytes, peak_memory_bytes, reset_peak_memory
from megakd.errors import MegakdError
from megakd.inputs.inputs import RunInputs
from megakd.inputs.run_data import cache_folder
from megakd.methods import run_method
from megakd.planning.cluster import GIGA, Cluster
from megakd.planning.plan import plan_run
from megakd.planning.planning_lab import check_method
from megakd.run.holder import held
from megakd.run.main import check_machines, check_output_folder, checked_inputs, started
from megakd.run.run_lab import RunLab
from megakd.storage.folders import check_writable
from megakd.training.progress import Reporter
from megakd.training.stage_run import StageRun

Level = Literal["ok", "warning", "failure"]
FOLDER = ".doctor"
"""Ending of the folder of the rehearsed steps, beside the run's folder, or its name in it."""
PROGRAMS = ("g++", "ninja")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the system's name for it, no file of ours
SETTLED = 20
"""Steps after which memory should not grow any more."""
GROWTH_BYTES, GROWTH = 64_000_000, 0.05
"""Growth that is told: more than both; the second is a share of the memory in use."""
UNPLANNED = 1.15
"""Memory that is told, as a multiple of the plan."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One line: the part of the run, the level, and the text with the cure."""

    part: str
    level: Level
    text: str


class Findings(list[Finding]):
    """Findings by parts; a part that fails ends the examination of what follows from it.

    error: what has ended the examination.
    """

    error: MegakdError | None = None

    @contextmanager
    def of(self, part: str) -> Iterator[list[str]]:
        """Collect the warnings and the error of the body; it adds what is fine to a list."""
        heard, fine, log = BufferingHandler(10**9), list[str](), logging.getLogger("megakd")
        heard.setLevel(logging.WARNING)
        log.addHandler(heard)
        try:
            yield fine
        except MegakdError as error:
            self.append(Finding(part, "failure", " ".join(str(error).split())))
            self.error = error
            raise
        finally:
            log.removeHandler(heard)
            texts = dict.fromkeys(record.getMessage() for record in heard.buffer)
            self += [Finding(part, "warning", text) for text in texts]
            self += [Finding(part, "ok", text) for text in fine]


def examine(config: RunConfig, *, steps: int, hostfile: Path | None = None) -> list[Finding]:
    """Return what is fine, doubtful or wrong with a run; a collective.

    Args:
        steps: optimiser steps that the first stage of the student takes; 0: none.
        hostfile: the nodes for DeepSpeed's launcher.
    """
    findings = Findings()
    try:
        if hostfile is not None:
            with findings.of("hostfile") as fine:
                fine.append(_hosts(hostfile))
        with findings.of("config") as fine:
            check_paths(config)
            check_output_folder(config)
            fine.append("can be read, and names files that exist")
        with ExitStack() as stack:
            with findings.of("ranks") as fine:
                ranks = stack.enter_context(started(config))
                fine.append(f"{ranks.world_size} on {ranks.device.type} have met")
            _examine_started(config, ranks, findings, steps)
    except MegakdError as error:
        if error is not findings.error:
            raise
    return findings


def _examine_started(config: RunConfig, ranks: Ranks, findings: Findings, steps: int) -> None:
    config = _rehearsed(config)
    with findings.of("machine") as fine:
        check_machines(config, ranks)
        fine.append(_versions())
        fine.append(together(_compiler))
        fine.append(together(partial(_folders, config)))
        fine.append("; ".join(dict.fromkeys(gather(_space(config)))))
    with held(config.output_dir):
        # Of an examination that was killed: no stage of another config may count.
        on_main(lambda: shutil.rmtree(config.output_dir / "stages", ignore_errors=True))
        try:
            with findings.of("data") as fine:
                prepared = checked_inputs(config)
                fine.extend(_data_facts(prepared))
            if steps:
                with findings.of("steps") as fine:
                    fine.extend(_rehearse(prepared, ranks, steps))
        finally:
            # Only while it is held: another examination of this run may use the folder.
            if ranks.is_main:
                for folder in (config.output_dir, *_pushed_weights(config)):
                    shutil.rmtree(folder, ignore_errors=True)
    told = [finding for others in gather([*findings]) for finding in others]
    findings[:] = dict.fromkeys(told)


def _rehearsed(config: RunConfig) -> RunConfig:
    def asked(spec: TeacherConfig) -> TeacherConfig:
        return replace(spec, cache=None) if spec.cache == AUTO else spec

    out = config.output_dir.absolute()  # "." has no name
    # A folder that is there may be a mount, or in a folder that cannot be written.
    return replace(
        config,
        output_dir=out / FOLDER if out.is_dir() else out.with_name(f"{out.name}{FOLDER}"),
        teacher=config.teacher and asked(config.teacher),
        teachers=tuple(map(asked, config.teachers)),
    )


def _pushed_weights(config: RunConfig) -> Iterator[Path]:
    server = config.rollout and config.rollout.server
    if server and server.folder:
        from megakd.servers.connect import run_name

        yield server.folder / run_name(config.output_dir)


def _data_facts(prepared: RunInputs) -> Iterator[str]:
    validation, train = prepared.encoded.validation, prepared.encoded.train
    of_train = "a stream" if prepared.encoded.stream is not None else f"{len(train):,} rows"
    yield f"{of_train} of train, {len(validation):,} rows of validation"
    yield f"the student's tokenizer has {len(prepared.tokenizer):,} tokens"


def _hosts(hostfile: Path) -> str:
    if not hostfile.is_file():
        raise MegakdError(f"{hostfile} does not exist")
    try:
        hosts = nodes.hosts_of(hostfile)
    except ValueError as error:
        raise MegakdError(
            f"{hostfile}: {error}; write each node once, as: node-1 slots=8"
        ) from error
    return ", ".join(f"{host} with {slots} ranks" for host, slots in hosts.items())


def _versions() -> str:
    packages = ("megakd", "torch", "deepspeed", "transformers", "datasets")
    here = {"python": platform.python_version()}
    here |= {name: importlib.metadata.version(name) for name in packages}
    by_node = dict(gather((node_name(), here)))
    (first, wanted), *others = by_node.items()
    for node, versions in others:
        for name, version in versions.items():
            if version != wanted[name]:
                raise MegakdError(
                    f"{first} has {name} {wanted[name]}, and {node} has {version}; install the "
                    "same on all nodes"
                )
    return ", ".join(f"{name} {version}" for name, version in wanted.items())


def _compiler() -> str:
    folder = use_own_extensions_folder()
    built = sorted(path.stem for path in folder.glob("**/*.so"))
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing and not built:
        logger.warning(
            "%s lacks %s, with which DeepSpeed compiles an offloaded optimizer, and Triton its "
            "kernels, at the first start; install them for these",
            *(node_name(), " and ".join(missing)),
        )
    for lock in folder.glob("**/lock"):
        logger.warning("another process compiles or loads extensions (%s); starts wait", lock)
    done = f"extensions in {folder}: {', '.join(built)}" if built else "no extension is built"
    return done if missing else f"{done}; {' and '.join(PROGRAMS)} are there"


def _folders(config: RunConfig) -> str:
    folders = {"output_dir": config.output_dir, "MEGAKD_CACHE": cache_folder()}
    folders["TORCH_EXTENSIONS_DIR"] = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for name, folder in folders.items():
        check_writable(folder, where=f"{name} on {node_name()}")
    return f"{', '.join(folders)} are writable on every node"


def _space(config: RunConfig) -> str:
    out = next(path for path in config.output_dir.absolute().parents if path.exists())
    free = {
        "output_dir": shutil.disk_usage(out).free,
        "memory": free_memory_bytes(torch.device("cpu")),
    }
    if SHARED_MEMORY.is_dir():
        free[str(SHARED_MEMORY)] = shutil.disk_usage(SHARED_MEMORY).free
    told = ", ".join(f"{size / GIGA:.1f} GB of {name}" for name, size in free.items())
    return f"free on {node_name()}: {told}"


def _rehearse(prepared: RunInputs, ranks: Ranks, steps: int) -> Iterator[str]:
    config, taken = prepared.config, None
    with closing(Reporter(config.output_dir, is_main=False)) as reporter:
        lab = RehearsingLab(prepared, ranks, reporter, steps=steps)
        check_method(prepared, ranks)
        with closing(lab):
            try:
                run_method(config.method, lab)
            except Rehearsed as rehearsed:
                taken = rehearsed
    if taken is not None:
        yield f"{taken.steps} steps of {taken.stage}, {taken.seconds / taken.steps:.2f} s each"
        yield from _labels(taken)
        yield from _memory(taken, config, ranks)
        yield on_main(partial(_disk, taken, config))


@dataclass
class Rehearsed(Exception):  # noqa: N818 - it ends the method, which has no result to go on with
    """The steps that were taken.

    counts: tokens (or rows) with a loss, all of them, rows without a loss, and all rows, over all
        ranks.
    peak: bytes that the steps took, of the rank with the most.
    growth: bytes in use at the end less those after `SETTLED` steps, of the rank with the most.
    held: bytes in use at the end, of this rank. saved: bytes of a checkpoint, of all ranks.
    """

    stage: str
    total_steps: int
    steps: int
    seconds: float
    counts: tuple[int, int, int, int]
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

    def _run(self, stage: Stage, folder: Path) -> StageResult:
        train = replace(stage.train, resume_from_checkpoint=True)
        if stage.role != STUDENT:
            train = replace(train, max_steps=1)
        return super()._run(replace(stage, train=train), folder)

    def _result(self, run: StageRun, folder: Path) -> StageResult:
        if run.stage.role != STUDENT:
            return super()._result(run, folder)
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
        raise Rehearsed(
            stage=run.stage.name,
            total_steps=run.steps,
            steps=steps,
            seconds=time.monotonic() - began,
            counts=(labelled, positions, empty, rows),
            peak=max(gather(peak_memory_bytes(device))),
            growth=max(gather(now - held if held else 0)),
            held=now,
            saved=sum(gather(saved)),
        )


def _labels(taken: Rehearsed) -> Iterator[str]:
    labelled, positions, empty, rows = taken.counts
    what = "rows" if positions == rows else "tokens"
    share = f"{labelled:,} of {positions:,} {what} carry a loss on labels"
    if not labelled:
        logger.warning("%s: only terms without labels learn; check the labels of the rows", share)
        return
    yield share
    if empty and what == "tokens":
        logger.warning(
            "%d of %d rows have no token with a loss: they are too short, or truncation leaves "
            "nothing of the answer; raise task.max_length or remove them",
            *(empty, rows),
        )


def _memory(taken: Rehearsed, config: RunConfig, ranks: Ranks) -> Iterator[str]:
    hosts = len({*gather(node_name())})
    device = "cuda" if ranks.device.type == "cuda" else "cpu"
    cluster = Cluster(ranks=ranks.world_size, nodes=hosts, device=device)
    plan = on_main(lambda: plan_run(config, cluster, advise=False).as_json())
    of_stage = next(phase for phase in plan["phases"] if phase["name"] == taken.stage)
    base = plan["host_base_bytes"] if device == "cpu" else 0
    planned = of_stage["peak_bytes_per_rank"] + base
    peak = f"the steps take {taken.peak / GIGA:.2f} GB per rank"
    told = f"{peak}, and the plan says {planned / GIGA:.2f} GB"
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
    labels, real = batch.labels, batch.valid.any(dim=-1)
    is_labelled = ~labels.isnan() if labels.is_floating_point() else labels != IGNORE
    by_row = is_labelled.reshape(len(labels), -1).any(dim=-1)
    positions = batch.valid if labels.dim() > 1 else real
    # Labelled and all positions; rows without a label and all rows.
    return torch.stack([part.sum() for part in (is_labelled, positions, real & ~by_row, real)])


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
