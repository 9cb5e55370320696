"""Real steps of every stage of a run, whose weights are thrown away, beside its plan."""

from __future__ import annotations

import itertools
import platform
import shutil
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from megakd.config.run import RunConfig
from megakd.config.sections import TeacherConfig
from megakd.config.task import AUTO
from megakd.engine.collectives import gather, node_name, on_main
from megakd.engine.distributed import Ranks
from megakd.engine.memory import device_name, forget_models, peak_memory_bytes, reset_peak_memory
from megakd.process.terminal import aligned_rows
from megakd.reports.plan import cluster_of, gigabytes, page, plan_run, process_bytes
from megakd.reports.plan_phases import PlannedWork, check_method, planned_phases
from megakd.reports.report_file import installed_versions
from megakd.reports.table import duration
from megakd.run.main import check_machines, checked_inputs, started
from megakd.run.teacher_pool import TeacherPool
from megakd.stage import Stage
from megakd.training.assembly import Assembly
from megakd.training.facts import RunFacts
from megakd.training.generated_texts import run_name
from megakd.training.stage_run import StageRun

STEPS = 3


def take_steps(assembly: Assembly, stage: Stage) -> tuple[int, float, int]:
    """Take steps of a stage on real rows; a collective.

    Models that the run would make before start from the shape that they have then.

    Returns:
        Number of all steps, seconds of one, and the highest peak of a rank in bytes.
    """
    forget_models()
    reset_peak_memory(assembly.ranks.device)
    pool, seconds, bases = TeacherPool(assembly), list[float](), assembly.config.base_teachers
    teachers = {name: pool.open(name, stage) for name in stage.teachers if name not in bases}
    run = StageRun(stage, assembly, teachers=teachers)
    stage.strategy.begin(run.student, run.first_step)
    with closing(run), closing(run.batches(run.first_step)) as every:
        for batches in itertools.islice(every, STEPS):
            began = time.monotonic()
            run.trainer.train_step(batches)
            seconds.append(time.monotonic() - began)
    peak = max(gather(peak_memory_bytes(assembly.ranks.device)))
    for teacher in teachers.values():
        teacher.destroy()
    # The first step fills caches, and compiles.
    return run.last_step - run.first_step, min(seconds[1:] or seconds), peak


def dry_run(config: RunConfig) -> str:
    """Return the plan of a run, and what some steps of each stage take; a collective.

    Nothing is written to the folder of the run, and the answers of a teacher are not cached.
    """

    def asked(spec: TeacherConfig) -> TeacherConfig:
        return replace(spec, cache=None) if spec.cache == AUTO else spec

    with started(config) as ranks:
        folder = Path(on_main(lambda: tempfile.mkdtemp(prefix="megakd-dry-run-")))
        try:
            config = replace(
                config,
                output_dir=folder,
                teacher=config.teacher and asked(config.teacher),
                teachers=tuple(map(asked, config.teachers)),
            )
            return _dry_run(config, ranks)
        finally:
            server = config.rollout and config.rollout.server
            if server and server.folder:  # weights that were pushed
                shutil.rmtree(server.folder / run_name(folder), ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)  # each node may have one


def _dry_run(config: RunConfig, ranks: Ranks) -> str:
    check_machines(config, ranks)
    prepared, device = checked_inputs(config, ranks), ranks.device
    check_method(prepared, ranks)
    process = process_bytes(has_data=True)
    facts = RunFacts(prepared.config, prepared.sources, world=ranks.world_size, inputs=prepared)
    work = PlannedWork(facts)
    work.assembly = assembly = Assembly(
        prepared=prepared, ranks=ranks, teachers=work.teachers, teachers_have_heads=False
    )
    stages = [phase.stage for phase in planned_phases(work) if phase.stage is not None]
    timed = {stage.name: take_steps(assembly, stage) for stage in stages}
    nodes = len(set(gather(node_name())))
    machines = {"ranks": ranks.world_size, "nodes": nodes, "device": device.type}

    def beside() -> str:
        plan = plan_run(prepared.config, cluster_of(machines), process=process)
        planned = {one.name: gigabytes(one.peak.total) for one in plan.phases}
        rows = [["stage", "steps", "s/step", "time", "peak GB", "planned GB"]]
        for name, (steps, seconds, peak) in timed.items():
            cells = [f"{steps:,}", f"{seconds:.3g}", duration(steps * seconds), gigabytes(peak)]
            rows.append([name, *cells, planned[name]])
        versions = " ".join(f"{name} {number}" for name, number in installed_versions().items())
        table = "\n".join(aligned_rows(rows))
        whole = duration(sum(steps * seconds for steps, seconds, _ in timed.values()))
        return (
            f"{page(plan)}\n\npython {platform.python_version()} {versions}\n"
            f"{device_name(device)}, {STEPS} steps of each stage:\n{table}\n"
            f"Training takes about {whole}, beside evaluations, scoring and other passes."
        )

    return on_main(beside)
