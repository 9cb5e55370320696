"""Python interface of megakd: several trainings, evaluations and plans in one process.

Each call restores logging, warnings, the environment, the random states and the number of threads.
Two changes last until the process ends: the process group stays open, because DeepSpeed can join
only one group in a process, and the memory allocator keeps freed memory, see
`engine.memory.keep_freed_memory`.
"""

from __future__ import annotations

import contextlib
import html
import logging
import os
import random
import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from megakd.config import file as config_file
from megakd.config.messages import shown
from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.process import signals
from megakd.process.record import FINAL, REPORT

if TYPE_CHECKING:
    from typing import Unpack

    from megakd.commands.predictions import Prediction, Text
    from megakd.reports.plan import Plan

Config = str | Path | Mapping[str, Any] | RunConfig
"""A path of a YAML file, a mapping with the same content, or a config that is already loaded."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """Result of a finished run.

    output_dir: the folder of the run.
    student: the folder of the student, final/, which `from_pretrained` reads.
    metrics: metrics of the student, on the test split if it has labels, else on validation.
    report: the content of report.json.
    table: the result table, as `megakd train` prints it; a notebook shows it.
    """

    output_dir: Path
    student: Path
    metrics: Mapping[str, float]
    report: Mapping[str, Any]
    table: str

    def pipeline(self, **options: Any) -> Any:
        """Return the student in a `transformers.pipeline`; `options` are the pipeline's own.

        A student of rows with any number of labels gives the labels that reach its threshold.
        """
        from megakd.commands.predictions import pipeline_of

        return pipeline_of(self.student, load_config(self.output_dir), **options)

    def predict(self, texts: Iterable[Text]) -> list[Prediction]:
        """Return what the student says of each text: a label, a list of labels, or a number.

        Args:
            texts: texts, or pairs of texts.

        Raises:
            MegakdError: the student is a language model, or a text is none.
        """
        from megakd.commands.predictions import predict_texts

        return predict_texts(self.student, load_config(self.output_dir), texts)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table)}</pre>"


class Size(TypedDict, total=False):
    """The size of a student: one of them. See `megakd shrink --help`."""

    parameters: str | int
    flops: str | float
    speedup: str | float


class ClusterOptions(TypedDict, total=False):
    """The machines of a plan; omitted options describe this machine. See `megakd plan --help`."""

    ranks: int
    nodes: int
    device: Literal["cpu", "cuda"]
    gpu_memory_gb: float
    host_memory_gb: float
    tflops: float
    gbps: float | str


def load_config(config: Config, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the checked run config of a file, a mapping or another config.

    Args:
        config: a path of a YAML file, a mapping with the same sections, or a RunConfig.
        overrides: settings such as `train.learning_rate=3e-4`; later ones win.

    Raises:
        ConfigError: the config cannot work, one line per problem.
    """
    is_list = isinstance(overrides, Sequence) and not isinstance(overrides, str)
    if not (is_list and all(isinstance(one, str) for one in cast("Sequence[object]", overrides))):
        raise ConfigError(
            f"overrides is {shown(overrides)}; give a list of texts such as "
            '["train.learning_rate=3e-4"]'
        )
    if isinstance(config, str | Path):
        return config_file.load_config(Path(config), overrides)
    if isinstance(config, RunConfig):
        return config_file.config_of(config_file.config_tree(config), overrides)
    if not isinstance(config, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"config is {shown(config)}; give the path of a YAML file, a mapping with the sections "
            "of such a file, or a RunConfig"
        )
    return config_file.config_of(config, overrides)


def train(config: Config, overrides: Sequence[str] = ()) -> RunResult:
    """Train as a config says and return the result.

    A finished run is not trained again, and an interrupted run is resumed. Ctrl+C and SIGTERM save
    a checkpoint after the next step, and then raise KeyboardInterrupt or SystemExit.

    Args:
        config: see `load_config`.
        overrides: see `load_config`.

    Raises:
        MegakdError: the input is invalid, or the run cannot continue.
    """
    checked = load_config(config, overrides)
    with _undone(), _stopped_by_signals():
        from megakd.reports.report_file import read_report
        from megakd.run import main as run

        table = run.run(checked, command="megakd.train")
        report = read_report(checked.output_dir / REPORT)
        return RunResult(
            output_dir=checked.output_dir,
            student=checked.output_dir / FINAL,
            metrics={name: report[f"student.{name}"] for name in report["metrics"]},
            report=report,
            table=table,
        )


def shrink(
    model: str | Path,
    *,
    data: object,
    output_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    **size: Unpack[Size],
) -> RunResult:
    """Cut a model to a size, repair it on the data, and return the result.

    The run is that of `megakd shrink`: a classifier is fine-tuned first if it is none yet.

    Args:
        model: a folder or a Hub id.
        data: a file, a folder, a Hub data set, a data frame, a `datasets.Dataset`, or rows by
            column, such as `{"text": …, "label": …}` or `{"messages": […]}`; or several of these by
            split, `{"train": …, "validation": …, "test": …}`, as in a `DatasetDict`.
        output_dir: the folder of the run; default: `runs/<model>-<size>`.
        overrides: settings such as `train.num_train_epochs=3`; later ones win.
        **size: one of `parameters` ("0.6B"), `flops` ("12%") and `speedup` ("8x").

    Raises:
        MegakdError: the input is invalid, or the run cannot continue.
    """
    if len(size) != 1:
        raise ConfigError(
            'the size of the student is one of parameters="0.6B", flops="12%" and speedup="8x" '
            f"(got {', '.join(size) or 'none'})"
        )
    sizes = {name: str(value) for name, value in size.items()}
    return _train_by_recipe(model, data, overrides, output_dir, size=sizes)


def distil(
    teacher: str | Path,
    student: str | Path | Mapping[str, Any],
    *,
    data: object,
    output_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> RunResult:
    """Let a student learn a teacher's answers to the data, and return the result.

    Args:
        teacher: a folder or a Hub id; a classifier is fine-tuned first if it is none yet.
        student: a folder or a Hub id, or a mapping for `student.model` such as `{"config": …}`.
        data: see `shrink`.
        output_dir: the folder of the run; default: `runs/<teacher>-<student>`.
        overrides: settings such as `train.num_train_epochs=3`; later ones win.

    Raises:
        MegakdError: the input is invalid, or the run cannot continue.
    """
    model = student if isinstance(student, Mapping) else str(student)
    return _train_by_recipe(teacher, data, overrides, output_dir, student=model)


def _train_by_recipe(
    model: str | Path,
    data: object,
    overrides: Sequence[str],
    output_dir: str | Path | None,
    **student: Any,
) -> RunResult:
    from megakd.commands.shrink import recipe
    from megakd.data.python_rows import sources_of_rows

    out = None if output_dir is None else Path(output_dir)
    tree = recipe(str(model), words=overrides, output_dir=out, **student)
    tree["task"] |= sources_of_rows(data, Path(tree["output_dir"]))
    return train(tree, overrides)


def evaluate(
    config: Config,
    model: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    data: str | Path | None = None,
) -> dict[str, float]:
    """Return the metrics of a model on the held-out split of a config, or on other data.

    Args:
        config: see `load_config`.
        model: the folder of a model; None: final/ of the config's run.
        overrides: see `load_config`.
        data: a file, pattern or folder to score in place of the held-out rows.

    Raises:
        MegakdError: the model does not exist, or it does not fit the task.
    """
    checked = load_config(config, overrides)
    with _undone():
        from megakd.commands.scored_models import evaluate_model

        given, folder = (None if path is None else str(path) for path in (data, model))
        return dict(evaluate_model(checked, folder, data=given)["metrics"])


def plan(config: Config, overrides: Sequence[str] = (), **cluster: Unpack[ClusterOptions]) -> Plan:
    """Return the memory, network and time estimates of a run, before anything is loaded.

    Args:
        config: see `load_config`.
        overrides: see `load_config`.
        **cluster: the machines: `ranks`, `nodes`, `device`, `gpu_memory_gb`, `host_memory_gb`,
            `tflops`, `gbps`.

    Raises:
        MegakdError: a model's config or a number cannot be read, or an option does not exist.
    """
    checked = load_config(config, overrides)
    with _undone():
        from megakd.commands import arguments
        from megakd.commands import plan as command

        parser = arguments.Parser(prog="megakd plan", description="")
        command.add_options(parser)
        words = [f"--{name}={value}" for name, value in cluster.items() if value is not None]
        return command.plan_of(checked, vars(parser.parse(words)))


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let a signal stop the run as it stops the command, and raise what Python's own would."""
    try:
        with signals.watched():
            yield
    except signals.Stopped as stop:
        if stop.number == signal.SIGINT:
            raise KeyboardInterrupt(str(stop)) from None
        logging.getLogger("megakd").warning("%s", stop)
        raise SystemExit(stop.exit_code) from None


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """Restore what a call changes in the process, except for the group and the allocator."""
    import numpy as np
    import torch

    from megakd.engine import distributed

    distributed.keep_group()
    root, package = logging.getLogger(), logging.getLogger("megakd")
    environment, handlers, levels = dict(os.environ), [*root.handlers], (root.level, package.level)
    states = random.getstate(), np.random.get_state(), torch.get_num_threads()  # noqa: NPY002
    # By default `fork_rng` starts every GPU of the machine.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_num_threads(states[2])
        os.environ.clear()
        os.environ.update(environment)
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        package.setLevel(levels[1])
