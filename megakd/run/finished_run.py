"""The identity of a run, what its results depend on, and what a finished run holds.

`run.json` holds the resolved config without the keys on which no result depends, the size, time and
hash of every data file and of every file of a local model, the revisions of models of the Hub, and
the dtypes on this device. A later start compares it before any work, and again when the files of
the Hub are there: stages and checkpoints in the folder are this run's.

A run is finished when its output folder has a report.json, which is written last.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from megakd.config.file import config_tree, dump_config, dump_yaml, places
from megakd.config.paths import expand_path
from megakd.config.run import RunConfig
from megakd.config.task import TaskConfig
from megakd.data.files import hash_of_file
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError
from megakd.models.architectures import current_files
from megakd.models.model_folder import WEIGHT_FILE, dtypes_of, hub_id, write_weights_as
from megakd.models.onnx import MODEL, check_packages, write_onnx
from megakd.process import files
from megakd.process.files import check_writable
from megakd.process.record import (
    CONFIG,
    FINAL,
    FORMAT,
    REPORT,
    RUN,
    Fingerprint,
    differences,
    exported_stage,
    flatten,
    read_record,
)
from megakd.process.seals import CARD, copy_finished, users_files, verified_entries
from megakd.reports.report_file import GRAPH, read_report, write_report
from megakd.reports.table import model_card, result_table
from megakd.run.holder import locked
from megakd.training.precision import training_dtype
from megakd.training.record import Report
from megakd.training.stage_folder import LENGTHS, files_beside_model, remake

logger = logging.getLogger(__name__)

_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_rank")
"""Ends of keys that split a step; of their values, only the rows of all ranks count."""

_FREE = (
    *("per_device_eval_batch_size", "joins_micro_batches", "rows_per_call", *_SPLIT),
    *("kernels", "collective_timeout"),
)
"""Ends of config keys on which no result depends; all kernels compute the same."""

_FREE_SECTIONS = ("output_dir", "log.", "save.", "eval.latency")

_PLACES = ("url", "folder")
"""Keys of a `server`: where the servers are changes no text and no answer."""

_LENGTHS = tuple(f"{section}.{key}" for section in ("train", "alone") for key in LENGTHS)
"""Keys of the length of the last stages, which compare it themselves: they may get longer."""

_ROWS = "rows of a step of all ranks"

_FILE, _CONTENT, _REVISION, _DEVICE = "file ", "content of ", "revision ", "on this device "


def fingerprint_of(config: RunConfig, ranks: Ranks) -> Fingerprint:
    """Return everything that the results of a run depend on; megakd's version does not count."""
    fields = {k: v for k, v in flatten(config_tree(config)).items() if not _is_free(k)}
    best = fields.get("eval.keep_best")
    chooses = best or (best is None and fields.get("eval.eval_steps") is not None)
    if not (chooses or any(fields[k] for k in fields if k.endswith("early_stopping_patience"))):
        fields["eval.eval_steps"] = None  # no evaluation decides which weights the run returns
    for section, train in config.trainings.items():
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
        fields[f"{section}: {_ROWS}"] = rows * ranks.world_size
        fields.pop(f"{section}.bf16", None)
        fields[f"{_DEVICE}{section}"] = training_dtype(train, ranks.device.type)
    for name, spec in config.teacher_specs.items():
        if spec.dtype is None:
            fields[f"{_DEVICE}{config.key_of(name)}"] = ranks.device.type
    for key, place in places(config):
        if key != "output_dir" and not key.endswith(".cache"):
            fields |= _files(key, str(place), config.task)
    return json.loads(files.json_text(fields))


def growable_keys(config: RunConfig) -> Fingerprint:
    """Return the keys that a finished run may change to do more: lengths, times, `final/`."""
    fields = flatten(config_tree(config)).items()
    keys = (*_LENGTHS, "save.onnx", "save.dtype")
    asked = {k: v for k, v in fields if k in keys or k.startswith("eval.latency")}
    return json.loads(files.json_text(asked))


def _is_free(key: str) -> bool:
    words = key.split(".")
    is_place = "server" in words and not {*words}.isdisjoint(_PLACES)
    free = "deepspeed" in words or is_place or key in _LENGTHS
    return free or key.startswith(_FREE_SECTIONS) or key.endswith(_FREE)


def _files(key: str, place: str, task: TaskConfig) -> Iterator[tuple[str, str]]:
    """Yield size, time and content of the files of a place, or the revision of a Hub name."""
    paths = [Path(path) for path in sorted(glob.glob(str(expand_path(place)), recursive=True))]  # noqa: PTH207
    for path in paths:
        inside = path.glob("*") if key.endswith(".model") else path.rglob("*")
        for file in [path] if path.is_file() else sorted(inside):
            name = file.relative_to(path.parent)
            if file.is_file() and file.name != CARD and not any(p[0] == "." for p in name.parts):
                facts = file.stat()
                when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts.st_mtime))
                yield f"{_FILE}{key} {name}", f"{facts.st_size} bytes of {when}"
                with suppress(OSError):  # whoever reads the file tells it
                    yield f"{_CONTENT}{key} {name}", hash_of_file(file, task)[:12]
    if not paths and (name := hub_id(place)) is not None:
        kind = "model" if key.endswith((".model", ".tokenizer")) else "dataset"
        folder = repo_folder_name(repo_id=name, repo_type=kind)
        ref = Path(constants.HF_HUB_CACHE) / folder / "refs" / "main"
        if ref.is_file():
            yield f"{_REVISION}{key}", ref.read_text(encoding="utf-8").strip()


def check_identity(out: Path, facts: Fingerprint, *, is_finished: bool = False) -> None:
    """Refuse another run than that of the folder, once it has a result.

    What a Hub's name stands for is compared if both starts had it in the cache, and the content of
    a file if both read it. Files that are gone and the device do not count for a finished run.
    """
    record = read_record(out)
    if record is None or not _has_results(out):
        return
    before = record["facts"]

    def counts(key: str) -> bool:
        if is_finished and key.startswith(_DEVICE):
            return False
        optional = (_REVISION, _CONTENT, *((_FILE,) if is_finished else ()))
        return not key.startswith(optional) or (key in before and key in facts)

    there, here = ({k: v for k, v in of.items() if counts(k)} for of in (before, facts))
    differing = differences(there, here)
    if differing:
        raise CheckpointError(
            f"{out} holds a run of another config ({differing}); use another output_dir, use that "
            f"config again{_same_rows(there, here)}, or start over with rm -r {quote(str(out))}; "
            f"a run with another output_dir may start from its models, such as {out / 'final'} and "
            f"{out / 'stages'}/NAME"
        )


def _same_rows(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    rows = there.get(f"train: {_ROWS}")
    if rows in (None, here.get(f"train: {_ROWS}")):
        return ""
    product = "per_device_train_batch_size x gradient_accumulation_steps x ranks"
    return f" ({product} must be {rows}, so the ranks must divide {rows})"


def begin_run(config: RunConfig, ranks: Ranks) -> None:
    """Write the identity of a run at its first start, and compare it at a later one.

    Call on rank 0 while the folder is held, when the inputs were read: models and data of the Hub
    are in the cache then.
    """
    out, facts = config.output_dir, fingerprint_of(config, ranks)
    check_identity(out, facts)
    if read_record(out) is None or not _has_results(out):
        files.write_text(out / CONFIG, dump_config(config))
        files.write_json(out / RUN, {"format": FORMAT, "facts": facts})


def _has_results(out: Path) -> bool:
    # A start that was refused, by a cache or a server for example, leaves none.
    return any(any((out / folder).glob("*")) for folder in ("stages", "checkpoints"))


FINETUNE = "finetune.yaml"

HEADER = """\
# Fine-tunes the student of {out} on a task with labels. The task here is an example: give your own
# files, and type: regression for scores.
#   deepspeed launch/train.py --config {out}/finetune.yaml task.dataset=FILE task.label_column=NAME
"""


def finished_table(config: RunConfig, facts: Fingerprint) -> str | None:
    """Return the result table of a finished run, or None if a run has something to do.

    A removed model is made again, and so is the report of a run that asks for more (see
    `growable_keys`).

    Raises:
        CheckpointError: the folder holds another run, or a model of it is damaged.
    """
    out = config.output_dir
    is_finished = (out / REPORT).is_file()
    check_identity(out, facts, is_finished=is_finished)
    record = read_record(out)
    if not is_finished or record is None or record.get("published") != growable_keys(config):
        return None
    report = read_report(out / REPORT)
    final = out / FINAL
    if not final.is_dir():
        return None
    again = "start the same command again: it is copied again from its stage"
    verified_entries(final, remedy=f"remove {final} and {again}")
    return result_table(report, final=final)


_GRAPHS = ".graphs"


def graph_path(output_dir: Path, row: str) -> Path:
    """Return the path of the graph of a row, which exists only while the run is finished."""
    return output_dir / _GRAPHS / row / MODEL


def remove_graphs(output_dir: Path) -> None:
    """Remove the graphs of the report."""
    shutil.rmtree(output_dir / _GRAPHS, ignore_errors=True)


def publish(
    config: RunConfig, student: Path, report: Report, *, dtype: torch.dtype, command: str
) -> str:
    """Write the models and then report.json, which marks the run as finished.

    Return the result table. `student`: the folder of the stage that becomes `final/`, whose weights
    have the dtype.
    """
    out = config.output_dir
    # A prolonged run has a report: a kill from here on leaves a run that is not finished.
    (out / REPORT).unlink(missing_ok=True)
    final, card = out / FINAL, model_card(config, student, report, command)
    if changed := users_files(final):
        names = (final.with_name(f"{FINAL}.unused-{number}") for number in itertools.count(1))
        aside = final.replace(next(name for name in names if not name.exists()))
        logger.warning("%s has files of yours: %s; it is now %s", final, ", ".join(changed), aside)

    def add_graph(folder: Path) -> None:
        shutil.copytree(graph_path(out, GRAPH).parent, folder, dirs_exist_ok=True)

    # The report knows whether the model can be expressed as a graph.
    has_graph = config.save.onnx and GRAPH in report["models"]
    _copy(student, final, {CARD: card}, dtype=dtype, add=add_graph if has_graph else None)
    remove_graphs(out)
    files.write_text(out / CONFIG, dump_config(config))
    published: dict[str, object] = {"student": student.name, "published": growable_keys(config)}
    published["dtype"] = str(dtype).removeprefix("torch.")
    files.write_json(out / RUN, {**(read_record(out) or {}), **published})
    _write_next_config(config, final)
    write_report(out / REPORT, report)
    _draw(out)
    return result_table(report, final=final)


def _copy(
    stage: Path,
    to: Path,
    changes: Mapping[str, str],
    *,
    dtype: torch.dtype | None,
    add: Callable[[Path], object] | None,
) -> None:
    """Copy the model of a finished stage with its weights in a dtype; None: as they are."""
    files = verified_entries(stage, remedy=remake(stage))
    changed = {**dict.fromkeys(files_beside_model(files)), **current_files(files), **changes}
    is_other = dtype is not None and dtypes_of(stage) != {dtype}
    if is_other:
        changed |= dict.fromkeys(name for name in files if WEIGHT_FILE.fullmatch(name))

    def complete(copied: Path) -> None:
        if dtype is not None and is_other:
            write_weights_as(dtype, stage, copied)
        if add is not None:
            add(copied)

    copy_finished(stage, to, changes=changed, add=complete, remedy=remake(stage))


def _draw(output_dir: Path) -> None:
    from megakd.reports.html import write_html_report

    try:
        write_html_report(output_dir)
    except Exception as error:  # noqa: BLE001 - a picture must not fail a finished run
        logger.warning(
            "report.html could not be written (run megakd report to try again): %s", error
        )


def export_run(
    config: RunConfig,
    stage: str | None,
    to: Path,
    *,
    add: Callable[[Path], object] | None = None,
) -> Path:
    """Copy a finished stage's model to a new folder `to`; None: the stage of `final/`.

    With `save.onnx` the graph is written too, unless something else is added.

    Args:
        add: called with the copy before it takes its name, to write the model in another form.
    """
    folder = exported_stage(config.output_dir, stage)
    check_writable(to, where="--to")
    is_finished = (config.output_dir / REPORT).is_file()
    published = (read_record(config.output_dir) if is_finished else None) or {}
    is_student = folder.name == published.get("student")
    dtype = getattr(torch, published.get("dtype", "float32")) if is_student else None
    if add is None and config.save.onnx:
        check_packages("save.onnx")
        add = write_onnx
    with locked(files.sibling(to.absolute(), "lock")):
        if to.exists() or to.is_symlink():
            raise CheckpointError(f"{to} already exists; give a folder that does not exist")
        _copy(folder, to, {}, dtype=dtype, add=add)
    return to


def _write_next_config(config: RunConfig, final: Path) -> None:
    path = config.output_dir / FINETUNE
    if config.task.type != "mlm" or path.exists():  # an existing file belongs to the user
        return
    # BERT's settings for GLUE (Devlin et al. 2019, A.3).
    tree = {
        "output_dir": str(config.output_dir / "finetuned"),
        "seed": config.seed,
        "task": {
            "type": "classification",
            "dataset": "glue/sst2",
            "max_length": config.task.max_length,
        },
        "student": {"model": str(final), "deepspeed": config.student.deepspeed},
        "method": {"name": "finetune"},
        "train": {
            "per_device_train_batch_size": 32,
            "num_train_epochs": 3,
            "learning_rate": 5e-5,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "bf16": config.train.bf16,
        },
    }
    files.write_text(path, HEADER.format(out=quote(str(config.output_dir))) + dump_yaml(tree))
