"""A whole run: checks, the method's stages, baselines, the exported student and the report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from megakd.config.file import config_tree, dump_config
from megakd.config.run import RunConfig
from megakd.contract.results import (
    Assistant,
    AssistantReport,
    LatencyReport,
    ModelReport,
    Report,
    Speedup,
)
from megakd.contract.stage import StageResult
from megakd.contract.tasks import STUDENT
from megakd.data.loader import lengths_of_rows
from megakd.engine import distributed
from megakd.engine.activity import doing, told
from megakd.engine.collectives import agree, on_main, reports_lost_peer
from megakd.engine.distributed import Ranks, warn_of_missing_variables
from megakd.engine.memory import (
    earlier_objects_left_alone,
    forget_models,
    free_memory_bytes,
    keep_freed_memory,
)
from megakd.engine.nodes import check_nodes
from megakd.errors import CheckpointError
from megakd.inputs.inputs import RunInputs, prepare, vocabulary_report
from megakd.inputs.precision import TORCH_DTYPE, check_device
from megakd.methods import run_method
from megakd.models.export import weight_bytes
from megakd.models.lora import adapter_parameters
from megakd.planning.method_check import check_method
from megakd.process.phases import counted, phase, seconds
from megakd.process.signals import Stopped
from megakd.reports.generated import generation_reports
from megakd.reports.history import read_history
from megakd.reports.latency import Work, measure_latencies
from megakd.reports.quantities import paired_ratio
from megakd.reports.report import environment
from megakd.reports.samples import Sampler
from megakd.reports.table import largest
from megakd.rollouts.runaway import text_warnings
from megakd.run.finished_run import CONFIG, FINAL, finished_table, is_finished, publish, run_inputs
from megakd.run.holder import held
from megakd.run.int8_score import score_int8
from megakd.run.lab import Lab
from megakd.run.upload import check_hub, push_to_hub
from megakd.servers.connect import check_servers
from megakd.servers.teachers import check_teacher_servers
from megakd.storage import atomic
from megakd.storage.folders import check_writable, users_files
from megakd.training.evaluation_sets import SetScores
from megakd.training.label_check import check_label_orders
from megakd.training.progress import Reporter
from megakd.training.recipes import baseline_stage, scoring_preset
from megakd.training.trackers import check_trackers, make_trackers

logger = logging.getLogger(__name__)


def run(config: RunConfig, *, command: str) -> str:
    """Run everything that the config asks for and return the result table.

    Args:
        config: the config of the run.
        command: the command as typed, for the model card.

    Raises:
        MegakdError: the input is invalid or the run cannot continue, on all ranks alike.
    """
    finished = is_finished(config)
    if not finished:
        check_output_folder(config)
    with counted(), ExitStack() as lock:
        with started(config) as ranks:
            if agree(finished):
                table = finished_table(config, command=command)
            else:
                lock.enter_context(held(config.output_dir))
                table = _run(config, command, ranks)
        # All ranks have left the process group, so no rank waits for the upload.
        uploaded = push_to_hub(config.save, config.output_dir / FINAL) if ranks.is_main else None
    return table if uploaded is None else f"{table}\n{uploaded}"


@contextmanager
def started(config: RunConfig) -> Iterator[Ranks]:
    """Set up the process group and the log of rank 0 for the length of a run."""
    keep_freed_memory()
    ranks = distributed.start(collective_timeout_s=config.train.collective_timeout)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("megakd").setLevel(logging.INFO if ranks.is_main else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    # DeepSpeed calls torch functions that torch is about to rename; users cannot change this.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    failure: BaseException | None = None
    try:
        telling = told() if ranks.is_main else nullcontext()
        with telling, reports_lost_peer(), earlier_objects_left_alone():
            warn_of_missing_variables()
            yield ranks
    except BaseException as error:
        is_saved = isinstance(error, Stopped) and error.saved
        failure = None if is_saved else error  # after a save, all ranks stop together
        raise
    finally:
        distributed.stop(failure=failure)


def _run(config: RunConfig, command: str, ranks: Ranks) -> str:
    check_device(config, ranks)
    check_nodes(config)
    on_main(lambda: check_hub(config.save))
    reporter = reporter_of(config, ranks)
    with phase("data"), doing("reading the data"):
        prepared = prepare(config)
        check_servers(prepared.config, prepared)
        check_teacher_servers(prepared.config, prepared)
    lab = Lab(prepared.config, prepared, ranks, reporter)
    check_label_orders(lab.assembly)
    check_method(prepared.config, prepared, ranks)
    inputs = on_main(lambda: run_inputs(config, prepared))
    on_main(lambda: users_files(config.output_dir / FINAL))
    on_main(lambda: _record_config(config))
    try:
        with phase("training"):
            student = run_method(config.method, lab)
            baselines = {
                name: lab.train(baseline_stage(lab, name, student)) for name in config.baselines
            }
        report = _report(lab, prepared, ranks, student, baselines)
    finally:
        lab.close()
        reporter.close()
    return on_main(lambda: publish(config, student.folder, report, inputs=inputs, command=command))


def reporter_of(config: RunConfig, ranks: Ranks) -> Reporter:
    """Return the reporter that logs a run; a collective.

    Raises:
        MegakdError: the library of a service in `log.report_to` is not installed, or the path of
            the log is used by something else.
    """
    services = config.log.report_to
    on_main(lambda: check_trackers(services))
    trackers = make_trackers(services, config.output_dir, config_tree(config))
    reporter = Reporter(
        config.output_dir,
        is_main=ranks.is_main,
        trackers=trackers if ranks.is_main else (),
    )
    on_main(reporter.check)
    return reporter


def _record_config(config: RunConfig) -> None:
    """Write config.yaml of a new run; an existing file is replaced when the run has finished.

    Therefore a start that is refused because of another config changes nothing.
    """
    path = config.output_dir / CONFIG
    if not path.exists():
        atomic.write_text(path, dump_config(config))


def _teachers(lab: Lab, sampler: Sampler, sets: SetScores) -> dict[str, ModelReport]:
    """Return size and metrics of every teacher; add its answers and its metrics on the sets."""
    reports = {}
    for name in lab.pool.folders:
        measured = lab.pool.measured(name)
        reports[name] = measured.report
        sets.add(name, measured.sets)
        if measured.answers is not None:
            sampler.add(name, measured.answers)
    return reports


def _report(
    lab: Lab,
    prepared: RunInputs,
    ranks: Ranks,
    student: StageResult,
    baselines: Mapping[str, StageResult],
) -> Report:
    config, out = lab.config, lab.config.output_dir
    preset = scoring_preset(config.student.deepspeed)
    sampler, sets = Sampler(lab.pool.prompts), SetScores(lab.assembly)
    with phase("scoring"):
        teachers = _teachers(lab, sampler, sets)
        scored = {
            name: lab.score(
                lab.source(result.folder), preset, look=sets.scoring(name, sampler.asking(name))
            )
            for name, result in {STUDENT: student, **baselines}.items()
        }
        if config.save.int8:
            scored[STUDENT]["int8"] = score_int8(lab, student.folder, preset)
        assistants = [_assistant(lab, made) for made in lab.record.assistants]
    students = {STUDENT: student.folder, **{n: made.folder for n, made in baselines.items()}}
    forget_models()
    with phase("latency"), doing("measuring latency"):
        latency = on_main(lambda: _latency(lab, students, ranks.device))
    return Report(
        method=config.method.name,
        task=config.task.data_name,
        metric_name=prepared.metric.name,
        evaluated_on="test" if prepared.encoded.test is not None else "validation",
        teacher=teachers.get(largest(teachers) or ""),
        teachers=[{"name": n, **teachers[n]} for n in teachers if config.teachers],
        student=_student(scored[STUDENT], student.folder),
        assistants=assistants,
        baselines={name: scored[name]["metrics"] for name in baselines},
        candidates=lab.record.candidates,
        stages=[_stage_entry(result) for result in lab.results],
        speedup=_speedup(latency, largest(teachers)),
        latency=latency,
        cost=lab.record.cost,
        pool=lab.record.pool,
        pruning=lab.record.pruning,
        vocabulary=vocabulary_report(config, prepared),
        samples=sampler.samples(teacher=largest(teachers), student=STUDENT),
        generation=on_main(lambda: generation_reports(out, [made.name for made in lab.results])),
        warnings=on_main(lambda: text_warnings(read_history(out / "metrics.jsonl"))),
        evaluation_sets=sets.report(),
        seconds=seconds(),
        environment=environment(
            ranks=ranks.world_size,
            device=ranks.device,
            corpus_content_hash=prepared.splits.whole_hash,
        ),
    )


def _student(scored: ModelReport, folder: Path) -> ModelReport:
    report: ModelReport = {**scored, "bytes": weight_bytes(folder)}
    trained = adapter_parameters(folder)
    return report if trained is None else {**report, "trained_parameters": trained}


def _assistant(lab: Lab, assistant: Assistant) -> AssistantReport:
    scored = lab.score(lab.source(assistant.folder), scoring_preset(lab.config.student.deepspeed))
    return {
        "name": assistant.name,
        "sparsity": assistant.sparsity,
        **scored,
        "bytes": weight_bytes(assistant.folder),
    }


def _stage_entry(result: StageResult) -> Any:
    return {
        "name": result.name,
        "steps": result.steps,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_bytes": result.peak_memory_bytes,
        "metrics": dict(result.metrics),
    }


def _latency(lab: Lab, students: Mapping[str, Path], device: torch.device) -> list[LatencyReport]:
    """Time all models side by side on rank 0, if all of them fit into the device's memory."""
    config = lab.config
    if config.eval.latency is False:
        return []
    teachers = {name: folder for name, folder in lab.pool.folders.items() if folder}
    if not teachers:
        return []
    assistants = {made.name: made.folder for made in lab.record.assistants}
    models = {**teachers, **assistants, **students}
    # On a CPU all models are timed in fp32, which doubles weights that are stored in 16 bits.
    room = 3 if device.type == "cpu" else 2
    needed, free = room * sum(map(weight_bytes, models.values())), free_memory_bytes(device)
    if needed > free:
        logger.warning(
            "latency is not measured: the models need about %.1f GB side by side, and %.1f GB are "
            "free on %s",
            needed / 1e9,
            free / 1e9,
            device,
        )
        return []
    try:
        wanted, rows = config.eval.latency, lab.assembly.prepared.encoded.held_out
        length = wanted.tokens or int(np.median(lengths_of_rows(rows)))
        work = Work(wanted.batches(config.task.type), length, wanted.generate)
        dtype = TORCH_DTYPE[lab.assembly.scoring_dtype()]
        return measure_latencies(models, work, device=device, dtype=dtype)
    except Exception as error:  # noqa: BLE001 - the code of a model may raise any error
        # All stages are finished and the student is valid: a failed timing must not fail the run.
        logger.warning("latency could not be measured: %s", error)
        return []


def _speedup(latency: Sequence[LatencyReport], teacher: str | None) -> Speedup | None:
    """Return the times of the largest teacher and the student at the smallest batch size."""
    forwards = [entry for entry in latency if "generated" not in entry]
    batch = min((entry["batch"] for entry in forwards), default=0)
    of = {entry["model"]: entry for entry in forwards if entry["batch"] == batch}
    if teacher not in of:
        return None
    theirs, mine = of[teacher], of[STUDENT]
    ratio = paired_ratio(theirs.get("rounds_ms", ()), mine.get("rounds_ms", ()))
    times = Speedup(batch=batch, teacher_ms=theirs["ms"], student_ms=mine["ms"])
    return {**times, "low": ratio.low, "high": ratio.high}


def check_output_folder(config: RunConfig) -> None:
    """Refuse to overwrite a run or to resume from a checkpoint path that does not exist.

    Raises:
        CheckpointError: the folder holds a run that may not be resumed, or the path is wrong.
        ConfigError: the folder cannot be written to.
    """
    out, resume = config.output_dir, config.train.resume_from_checkpoint
    if resume is False and any((out / name).exists() for name in (CONFIG, "checkpoints", "stages")):
        raise CheckpointError(
            f"{out} holds a run and train.resume_from_checkpoint is false; use another output_dir, "
            "remove that folder, or set train.resume_from_checkpoint to true"
        )
    check_checkpoint_given("train.resume_from_checkpoint", resume)
    for name, spec in config.teacher_specs.items():
        if spec.finetune is not None:
            where = f"{config.key_of(name)}.finetune.resume_from_checkpoint"
            check_checkpoint_given(where, spec.finetune.resume_from_checkpoint)
    check_writable(out, where="output_dir")


def check_checkpoint_given(where: str, path: bool | str | None) -> None:  # noqa: FBT001
    """Refuse a checkpoint path that does not exist.

    Raises:
        CheckpointError: the path does not exist.
    """
    if isinstance(path, str) and not Path(path).is_dir():
        raise CheckpointError(
            f"{where}: {path} does not exist; give a folder such as "
            f"checkpoints/<stage>/step-<n>, or true for the newest"
        )
