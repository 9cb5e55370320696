"""Examination of a run before it is started, in findings of one line each."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Literal

from megakd.commands.examined_machine import hosts_of, machine_facts
from megakd.commands.matched_models import same_files
from megakd.commands.rehearsed_steps import Rehearsed, RehearsingLab, step_findings
from megakd.config.checks.path_rules import check_paths
from megakd.config.models import TeacherConfig
from megakd.config.run import RunConfig
from megakd.contract.tasks import AUTO
from megakd.engine.collectives import gather
from megakd.engine.distributed import Ranks
from megakd.errors import MegakdError
from megakd.inputs.inputs import RunInputs
from megakd.methods import run_method
from megakd.planning.planning_lab import check_method
from megakd.run.holder import held
from megakd.run.main import check_machines, check_output_folder, checked_inputs, started
from megakd.training.label_check import check_label_orders
from megakd.training.progress import Reporter

Level = Literal["ok", "warning", "failure"]
FOLDER = ".doctor"
"""Ending of the folder of the rehearsed steps, beside the run's folder, or its name in it."""


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
                fine.append(hosts_of(hostfile))
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
        fine.extend(machine_facts(config))
    with held(config.output_dir):
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
    """Return the config with a folder of its own, and teachers that answer without a cache."""

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
    for name in prepared.config.teacher_specs:
        same = same_files(prepared, name)
        told = (f"{what.replace('_', ' ')} {how}" for what, how in same.items())
        yield f"{name}, compared with the student: {', '.join(told)}"


def _rehearse(prepared: RunInputs, ranks: Ranks, steps: int) -> Iterator[str]:
    config, taken = prepared.config, None
    with closing(Reporter(config.output_dir, is_main=False)) as reporter:
        lab = RehearsingLab(prepared, ranks, reporter, steps=steps)
        check_label_orders(lab.assembly)
        check_method(prepared, ranks)
        with closing(lab):
            try:
                run_method(config.method, lab)
            except Rehearsed as rehearsed:
                taken = rehearsed
    if taken is not None:
        yield from step_findings(taken, config, ranks)
