"""A finished run: its result table, its student in `final/`, and its stages.

A run is finished when its output folder has a report.json, which is written last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote

import torch
from transformers.utils.hub import CHAT_TEMPLATE_FILE

from megakd.config.file import dump_config, dump_yaml
from megakd.config.run import RunConfig
from megakd.contract.results import Report
from megakd.contract.tasks import STUDENT
from megakd.errors import CheckpointError
from megakd.models.model_folder import (
    WEIGHT_FILE,
    brings_code,
    dtypes_of,
    needs_5,
    write_weights_as,
)
from megakd.models.onnx import check_packages, write_onnx
from megakd.models.own_models import current_files
from megakd.process import atomic
from megakd.process.fingerprint import Fingerprint
from megakd.process.folders import (
    CARD,
    check_writable,
    copy_finished,
    open_finished,
    users_files,
)
from megakd.process.run_folder import (
    CONFIG,
    FINAL,
    REPORT,
    RUN,
    exported_stage,
    read_record,
)
from megakd.reports.card import CardFacts, model_card
from megakd.reports.report_file import GRAPH, read_report, write_report
from megakd.reports.table import result_table
from megakd.run.holder import written_once
from megakd.run.run_identity import asked_of, check_identity
from megakd.training.stage_folder import files_beside_model, remake

logger = logging.getLogger(__name__)
FINETUNE = "finetune.yaml"
HEADER = """\
# Fine-tunes the student of {out} on a task with labels. The task here is an example: give your own
# files, and type: regression for scores.
#   deepspeed launch/train.py --config {out}/finetune.yaml task.dataset=FILE task.label_column=NAME
"""


def finished_table(config: RunConfig, facts: Fingerprint) -> str | None:
    """Return the result table of a finished run, or None if a run has something to do.

    A removed model is made again, and so is the report of a run that asks for more, see `asked_of`.

    Raises:
        CheckpointError: the folder holds another run, or a model of it is damaged.
    """
    out = config.output_dir
    is_finished = (out / REPORT).is_file()
    check_identity(out, facts, is_finished=is_finished)
    record = read_record(out)
    if not is_finished or record is None or record.get("published") != asked_of(config):
        return None
    report = read_report(out / REPORT)
    final = out / FINAL
    if not final.is_dir():
        return None
    again = "start the same command again: it is copied again from its stage"
    open_finished(final, remedy=f"remove {final} and {again}")
    return result_table(report, final=final)


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
    card = _card(config, student, report, command)
    # The report knows whether the model can be expressed as a graph.
    has_graph = config.save.onnx and GRAPH in report["models"]
    _write_model(student, out / FINAL, card, dtype=dtype, has_graph=has_graph)
    atomic.write_text(out / CONFIG, dump_config(config))
    published: dict[str, object] = {"student": student.name, "published": asked_of(config)}
    published["dtype"] = str(dtype).removeprefix("torch.")
    atomic.write_json(out / RUN, {**(read_record(out) or {}), **published})
    _write_next_config(config, out / FINAL)
    write_report(out / REPORT, report)
    _draw(out)
    return result_table(report, final=out / FINAL)


def _card(config: RunConfig, stage: Path, report: Report, command: str) -> str:
    models = {name: spec.model for name, spec in config.teacher_specs.items()}
    models |= dict.fromkeys(config.base_teachers, config.student.model)
    start = {**models, STUDENT: config.student.model}[config.start_role]
    facts = CardFacts(
        title=f"{config.output_dir.absolute().name}: a student distilled by megakd",
        task_type=config.task.type,
        student=start if isinstance(start, str) else None,
        teachers=tuple(model if isinstance(model, str) else None for model in models.values()),
        command=command,
        brings_code=brings_code(stage),
        needs_5=needs_5(stage),
        chats=(stage / CHAT_TEMPLATE_FILE).is_file(),
    )
    return model_card(facts, report)


def _write_model(stage: Path, to: Path, card: str, *, dtype: torch.dtype, has_graph: bool) -> None:
    changed = users_files(to)
    if changed:
        aside = atomic.set_aside(to)
        logger.warning("%s has files of yours: %s; it is now %s", to, ", ".join(changed), aside)
    _copy(stage, to, {CARD: card}, dtype=dtype, add=write_onnx if has_graph else None)


def _copy(
    stage: Path,
    to: Path,
    changes: Mapping[str, str],
    *,
    dtype: torch.dtype | None,
    add: Callable[[Path], object] | None,
) -> None:
    """Copy the model of a finished stage with its weights in a dtype; None: as they are."""
    files = open_finished(stage, remedy=remake(stage))
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
    with written_once(atomic.sibling(to.absolute(), "lock")):
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
    atomic.write_text(path, HEADER.format(out=quote(str(config.output_dir))) + dump_yaml(tree))
