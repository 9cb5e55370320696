"""A whole run: checks, the method's stages, baselines, the exported student and the report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from shlex import quote
from typing import cast

import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from megakd.config.file import config_tree
from megakd.config.run import RunConfig, SaveConfig
from megakd.engine import distributed
from megakd.engine.collectives import activity, gather, node_name, on_main, reports_lost_peer
from megakd.engine.distributed import Ranks, check_nodes
from megakd.engine.memory import earlier_objects_left_alone, keep_freed_memory
from megakd.errors import ConfigError, first_line
from megakd.methods import run_method
from megakd.models.onnx import check_packages
from megakd.process.clock import counted, phase
from megakd.process.files import check_writable
from megakd.process.record import FINAL, REPORT, differences, flatten
from megakd.process.signals import Stopped
from megakd.reports.plan_phases import check_method, check_size
from megakd.reports.report_file import installed_versions
from megakd.run.finished_run import begin_run, fingerprint_of, finished_table, publish
from megakd.run.holder import locked_on_main
from megakd.run.run_report import report_of
from megakd.run.run_work import RunWork
from megakd.training.inputs import RunInputs, prepare
from megakd.training.lab import Lab, baseline_stage
from megakd.training.log import Reporter
from megakd.training.precision import check_device
from megakd.training.trackers import Trackers, check_trackers

# The bases of the Hub's error are OSError and the error of its HTTP client, which has two names.
_HUB_FAILURES = cast("tuple[type[Exception], ...]", (ValueError, *HfHubHTTPError.__bases__))


def run(config: RunConfig, *, command: str) -> str:
    """Run everything that the config asks for and return the result table; `command` as typed."""
    check_output_folder(config)
    with counted(), ExitStack() as lock:
        with started(config) as ranks:
            table = on_main(lambda: finished_table(config, fingerprint_of(config, ranks)))
            if table is None:
                lock.enter_context(locked_on_main(config.output_dir))
                table = _run(config, command, ranks)
        # All ranks have left the process group, so no rank waits for the upload.
        if config.save.push_to_hub is not None and ranks.is_main:
            table += f"\n{push_to_hub(config.save, config.output_dir / FINAL)}"
    return table


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
        with reports_lost_peer(), earlier_objects_left_alone():
            check_same_everywhere(config)
            yield ranks
    except BaseException as error:
        is_saved = isinstance(error, Stopped) and error.saved
        failure = None if is_saved else error  # after a save, all ranks stop together
        raise
    finally:
        distributed.stop(failure=failure)


def check_same_everywhere(config: RunConfig) -> None:
    """Check that all ranks have the same config and the same versions; a collective.

    Raises:
        ConfigError: a rank has another config, or another version of a library.
    """
    name = f"rank {distributed.ranks().rank} on {node_name()}"
    here = {**installed_versions(), **flatten(config_tree(config))}
    (first, facts), *others = gather((name, here))
    for other, its in others:
        if differing := differences(facts, its):
            raise ConfigError(
                f"{other} has another config or version than {first} ({differing}, where there is "
                f"{first}); start all ranks with the same config and the same installation"
            )


def _run(config: RunConfig, command: str, ranks: Ranks) -> str:
    with closing(reporter_of(config, ranks)) as reporter:
        check_machines(config, ranks)
        with phase("data"), activity("reading the data"):
            prepared = checked_inputs(config, ranks)
        check_method(prepared, ranks)
        on_main(lambda: begin_run(config, ranks))
        lab = Lab(RunWork(prepared, ranks, reporter))
        with closing(lab.work):
            with phase("training"):
                student = run_method(config.method, lab)
                baselines = {
                    name: lab.train(baseline_stage(lab, name, student))
                    for name in config.trained_baselines
                }
            report = report_of(lab, student, baselines)
    return on_main(
        lambda: publish(config, student.folder, report, dtype=lab.work.saved_dtype, command=command)
    )


def check_machines(config: RunConfig, ranks: Ranks) -> None:
    """Check that the machines have what the config asks for; a collective."""
    check_device(config, ranks)
    check_nodes(config)
    if config.save.onnx:
        check_packages("save.onnx")
    if config.save.push_to_hub is not None:
        on_main(lambda: check_hub(config.save))


def checked_inputs(config: RunConfig, ranks: Ranks) -> RunInputs:
    """Return the inputs of a run, whose servers answer; a collective."""
    prepared = prepare(config, partial(check_size, config, ranks))
    if config.rollout is not None:
        from megakd.training.generated_texts import check_servers

        check_servers(prepared)
    if any(spec.server for spec in config.teacher_specs.values()):
        from megakd.training.served_teachers import check_teacher_servers

        check_teacher_servers(prepared)
    return prepared


def reporter_of(config: RunConfig, ranks: Ranks) -> Reporter:
    """Return the reporter that logs a run; a collective."""
    services = config.log.report_to
    trackers = None
    if services:
        on_main(lambda: check_trackers(services))
        trackers = Trackers(services, config.output_dir, config_tree(config))
    reporter = Reporter(config.output_dir, is_main=ranks.is_main, trackers=trackers)
    on_main(reporter.check)
    return reporter


def check_output_folder(config: RunConfig) -> None:
    """Refuse a folder that cannot be written, unless its run is finished."""
    if not (config.output_dir / REPORT).is_file():
        check_writable(config.output_dir, where="output_dir")


def check_hub(config: SaveConfig) -> None:
    """Check, before a run starts, that the Hub knows the token of `save.push_to_hub`."""
    try:
        HfApi().whoami()
    except _HUB_FAILURES as error:
        raise ConfigError(
            f"save.push_to_hub: {config.push_to_hub} needs a token that the Hub accepts, and the "
            f"check failed ({first_line(error)}); run `hf auth login` or set HF_TOKEN, or remove "
            "the key and upload the student later"
        ) from error


def push_to_hub(config: SaveConfig, final: Path) -> str:
    """Upload the student to `save.push_to_hub`, and return a status line.

    A finished run does not fail here: after an error, the line says how to repeat the upload.
    """
    repository = cast("str", config.push_to_hub)
    try:
        api = HfApi()
        api.create_repo(repository, private=config.hub_private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=final, commit_message="Upload a student of megakd"
        )
    except _HUB_FAILURES as error:
        private = " --private" if config.hub_private else ""
        return (
            f"the student was not uploaded to {repository} ({first_line(error)}); upload it with: "
            f"hf upload {repository} {quote(str(final))}{private}"
        )
    return f"the student was uploaded to https://huggingface.co/{repository}"
