"""A finished run: its record, its result table, its student in `final/`, and its stages.

A run is finished when its output folder has a report.json. run.json records the inputs of the run,
the stage that became `final/`, and the checksums of `final/` and of the report.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

from megakd.config.checks.path_rules import names_files, places
from megakd.config.file import config_tree, dump_config, dump_yaml, load_config
from megakd.config.paths import is_path
from megakd.config.run import RunConfig
from megakd.contract.plugins import code_of, is_metric, metric_of
from megakd.contract.results import Report
from megakd.contract.tasks import FROM_TEACHER, STUDENT, STUDENT_BASE
from megakd.data.encoding import tokenizer_content
from megakd.engine.collectives import agree, on_main
from megakd.engine.distributed import launched_ranks
from megakd.errors import CheckpointError, ConfigError, MegakdError, suggestion
from megakd.inputs.inputs import UnencodedInputs, unencoded_inputs
from megakd.models.model_folder import brings_code, needs_5
from megakd.models.onnx import check_packages, write_onnx
from megakd.models.own_models import current_files
from megakd.process.terminal import in_home
from megakd.reports.card import CardFacts, model_card
from megakd.reports.report_file import GRAPH, read_report, report_of_size, write_report
from megakd.reports.table import result_table
from megakd.run.holder import held, written_once
from megakd.run.stage_identity import FREE, PLACES
from megakd.storage import atomic
from megakd.storage.checksums import checksum_of, damage_of, read_signed, write_signed
from megakd.storage.fingerprint import Fingerprint, as_read_back, differences, flatten
from megakd.storage.folders import (
    CARD,
    check_writable,
    copy_finished,
    entries,
    open_finished,
    users_files,
)
from megakd.training.assembly import model_identity
from megakd.training.best_checkpoint import RECORD
from megakd.training.stage_folder import (
    RESULT,
    files_of_others,
    files_of_window,
    is_longer,
    keeps_last,
    remake,
)

logger = logging.getLogger(__name__)
REPORT = "report.json"
CONFIG = "config.yaml"
FINAL = "final"
SIZES = "sizes"
"""Folder of the larger students of a run that makes several."""
RUN = "run.json"
_FREE = ("per_device_eval_batch_size", "micro_batches_per_call", "rows_per_call", *FREE)
"""Ends of config keys on which no result depends."""
_FREE_SECTIONS = ("output_dir", "log.", "save.")
FINETUNE = "finetune.yaml"
HEADER = """\
# Fine-tunes the student of {out} on a task with labels. The task here is an example: give your own
# files, and type: regression for scores.
#   deepspeed launch/train.py --config {out}/finetune.yaml task.dataset=FILE task.label_column=NAME
"""


def is_finished(config: RunConfig) -> bool:
    """Return true if the output folder holds the finished run of this config; read only the config.

    A run is not finished if the config asks for more steps than the run in the folder took, for
    a graph that the run did not write, or for other times of the models. The finished run of
    another config is an error.
    """
    if not (config.output_dir / REPORT).is_file() or config.train.resume_from_checkpoint is False:
        return False
    ranks = launched_ranks()
    report: Mapping[str, Any] = read_report(config.output_dir / REPORT)
    before = _config_there(config.output_dir)
    there = _facts(before, report.get("environment.ranks", ranks))
    here = _facts(config, ranks)
    timed = [
        {key: fields.pop(key) for key in [*fields] if key.startswith("eval.latency")}
        for fields in (there, here)
    ]
    if is_longer(there, here):
        return False
    differing = differences(there, here)
    if differing:
        raise CheckpointError(
            f"{config.output_dir} holds a finished run of another config ({differing}); use "
            "another output_dir, use that config again, or start over with rm -r "
            f"{quote(str(config.output_dir))}; to train its student further, set student.model="
            f"{config.output_dir / FINAL} and another output_dir"
        )
    return timed[0] == timed[1] and config.save.onnx <= before.save.onnx


def _config_there(out: Path) -> RunConfig:
    try:
        return load_config(out / CONFIG)
    except ConfigError as error:
        raise CheckpointError(
            f"{out} holds a finished run whose config this version cannot read ({error}); use "
            f"another output_dir, or start over with rm -r {quote(str(out))}"
        ) from error


def _facts(config: RunConfig, ranks: int) -> Fingerprint:
    fields = {k: v for k, v in flatten(config_tree(config)).items() if not _is_free(k)}
    for section, train in config.trainings.items():
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
        fields[f"{section}: rows of a step of all ranks"] = rows
    return fields | ({"eval.eval_steps": None} if keeps_last(fields) else {})


def _is_free(key: str) -> bool:
    words = key.split(".")
    is_place = "server" in words and not {*words}.isdisjoint(PLACES)
    return "deepspeed" in words or is_place or key.startswith(_FREE_SECTIONS) or key.endswith(_FREE)


def finished_table(config: RunConfig, *, command: str) -> str:
    """Verify a finished run and return its result table; a collective.

    A model that was removed is copied again from its stage; its card names the `command`.
    """
    out = config.output_dir
    record = on_main(lambda: _record_there(out))
    report = on_main(lambda: _report_there(out, record))
    if record is None and not on_main((out / FINAL).is_dir):
        raise CheckpointError(f"{out / FINAL} does not exist; {_again(out / REPORT)}")
    if record is not None:
        _compare_inputs(config, record["inputs"])
        stages, sizes = out / "stages", record.get("sizes", {})
        models = {out / FINAL: (stages / record["student"], record["final"])}
        models |= {out / SIZES / name: (stages / name, files) for name, files in sizes.items()}
        for folder, (stage, files) in models.items():
            missing = on_main(partial(_missing, folder, stage, files))
            if missing:
                logger.warning(
                    "%s lacks %s: the student is copied again from %s",
                    *(folder, ", ".join(missing), stage),
                )
                with held(out):
                    on_main(partial(_write_model, config, stage, folder, report, command))
    return result_table(report, final=out / FINAL)


def run_inputs(config: RunConfig, inputs: UnencodedInputs) -> Fingerprint:
    """Return the inputs besides the config that results depend on: data, models and plug-ins."""
    plugins = {"method": config.method, **dict(enumerate(config.objective or ()))}
    metrics = {name: metric_of(name) for name in inputs.metrics.names if is_metric(name)}
    tree: dict[str, Any] = {
        "task.dataset": inputs.splits.whole_hash,
        "code": {key: code_of(value) for key, value in (plugins | metrics).items()},
        "task.tokenizer": tokenizer_content(inputs.teacher_tokenizer or inputs.tokenizer),
    }
    if inputs.teacher_tokenizer is not None:
        tree["method.student_vocabulary"] = tokenizer_content(inputs.tokenizer)
    for role, source in inputs.sources.items():
        tree[f"{config.key_of(role)}.model"] = model_identity(source, seed=config.seed)
    return flatten(tree)


def _compare_inputs(config: RunConfig, there: Fingerprint) -> None:
    try:
        inputs = unencoded_inputs(config)
        here = on_main(lambda: run_inputs(config, inputs))
    except MegakdError as error:
        # The error is that of all ranks, so that all ranks decide alike.
        gone = agree(_not_here(config, error))
        if not gone:
            raise
        logger.warning(
            "%s cannot be compared with the inputs that the run was made from: %s",
            ", ".join(gone),
            error,
        )
        return
    differing = differences(there, as_read_back(here))
    if differing:
        raise CheckpointError(
            f"{config.output_dir} holds a finished run that was made from other data or models "
            f"({differing}); use another output_dir, or restore the original data and models"
        )


def _not_here(config: RunConfig, error: MegakdError) -> list[str]:
    # Of the keys whose model or data is no longer on this machine. A name that may be the Hub's
    # counts only if the error is about the Hub: such a name has no path here.
    is_of_hub = "the Hub" in str(error)
    gone = (
        key
        for key, place in places(config)
        if key != "output_dir"
        and not key.endswith((".cache", ".chat_template"))
        and place not in (FROM_TEACHER, STUDENT_BASE)
        and not glob.glob(str(in_home(place)), recursive=True)  # noqa: PTH207
        and (is_of_hub or isinstance(place, Path) or is_path(place) or names_files(key))
    )
    return list(dict.fromkeys(gone))


def _record_there(out: Path) -> dict[str, Any] | None:
    path = out / RUN
    if not path.is_file():
        logger.warning(
            "%s is missing: the data, models and student of the run cannot be compared with those "
            "the run was made from",
            path,
        )
        return None
    try:
        return read_signed(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_again(out / REPORT)}") from error


def _report_there(out: Path, record: Mapping[str, Any] | None) -> Report:
    path = out / REPORT
    report = read_report(path)
    if record is not None and checksum_of(report) != record["report"]:
        raise CheckpointError(f"{path} was changed after the run had finished; {_again(path)}")
    return report


def _again(report: Path) -> str:
    return (
        f"remove {report} and start the same command again: finished stages are not trained again"
    )


def _missing(model: Path, stage: Path, files: Mapping[str, Any]) -> list[str]:
    atomic.recover(model)
    missing = [name for name in files if not (model / name).is_file()]
    there = {name: entry for name, entry in files.items() if name not in missing}
    changed = damage_of(model, there)
    if changed is not None:
        raise CheckpointError(
            f"{model} is not the student of this run: {changed}; move {model} away and start the "
            f"same command again: the student is copied again from {stage}"
        )
    return missing


def publish(
    config: RunConfig, student: Path, report: Report, *, inputs: Fingerprint, command: str
) -> str:
    """Write the models, run.json and then report.json, which marks the run as finished.

    Return the result table. `student`: the folder of the stage that becomes `final/`.
    """
    out = config.output_dir
    names = report["sizes"]
    for name in names:
        _write_model(config, out / "stages" / name, out / SIZES / name, report, command)
    _write_model(config, student, out / FINAL, report, command)
    # A prolonged run has a report: without the report, a kill from here on leaves a run that has
    # not finished, and the next start publishes again.
    (out / REPORT).unlink(missing_ok=True)
    sizes = {name: _files_of(out / SIZES / name) for name in names}
    models = {"student": student.name, "final": _files_of(out / FINAL), "sizes": sizes}
    record = {**models, "report": checksum_of(report)}
    atomic.write_text(out / CONFIG, dump_config(config))
    write_signed(out / RUN, record | {"inputs": inputs})
    _write_next_config(config, out / FINAL)
    write_report(out / REPORT, report)
    _draw(out)
    return result_table(report, final=out / FINAL)


def _write_model(config: RunConfig, stage: Path, to: Path, report: Report, command: str) -> None:
    if to.name in report["sizes"]:
        report = report_of_size(report, to.name)
    remedy = remake(stage)
    there = open_finished(stage, remedy=remedy)
    atomic.recover(to)
    kept = users_files(to)
    if kept:
        logger.warning("%s: files that megakd did not write are kept: %s", to, ", ".join(kept))
    card = model_card(_card_facts(config, stage, command), report)
    changes = {CARD: card, **dict.fromkeys((RESULT, RECORD, *files_of_others(there)))}
    changes |= current_files(there)
    # The report decides, because `save` may change between two starts of a finished run.
    add = write_onnx if GRAPH in report["models"] else None
    copy_finished(stage, to, changes=changes, keep=kept, add=add, remedy=remedy)


def _files_of(model: Path) -> dict[str, Any]:
    return {name: entry for name, entry in entries(model).items() if name != CARD}


def _card_facts(config: RunConfig, stage: Path, command: str) -> CardFacts:
    models = {name: spec.model for name, spec in config.teacher_specs.items()}
    models |= dict.fromkeys(config.base_teachers, config.student.model)
    start = {**models, STUDENT: config.student.model}[config.start_role]
    return CardFacts(
        title=f"{config.output_dir.absolute().name}: a student distilled by megakd",
        task_type=config.task.type,
        student=start if isinstance(start, str) else None,
        teachers=tuple(model if isinstance(model, str) else None for model in models.values()),
        objective=tuple(map(_line, config_tree(config)["objective"] or ())),
        command=command,
        brings_code=brings_code(stage),
        needs_5=needs_5(stage),
    )


def _line(term: Mapping[str, Any]) -> str:
    options = ", ".join(f"{key} {value}" for key, value in term.items() if key != "loss")
    return f"{term['loss']} ({options})"


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
    stages = config.output_dir / "stages"
    # Others, such as a scoring, give only scores.
    finished = (path.parent for path in stages.glob(f"*/{RESULT}"))
    models = sorted(folder.name for folder in finished if (folder / "config.json").is_file())
    listed = f"finished stages: {', '.join(models) or 'none'}"
    name = stage or _student_stage(config.output_dir, listed)
    if name not in models:
        raise CheckpointError(f"{_no_model_of(name, stages)} {listed}")
    check_writable(to, where="--to")
    folder = stages / name
    there = entries(folder)
    changes = dict.fromkeys((RESULT, RECORD, *files_of_window(there), *files_of_others(there)))
    changes |= current_files(there)
    if add is None and config.save.onnx:
        check_packages("save.onnx")
        add = write_onnx
    with written_once(atomic.sibling(to.absolute(), "lock")):
        if to.exists() or to.is_symlink():
            raise CheckpointError(f"{to} already exists; give a folder that does not exist")
        copy_finished(folder, to, changes=changes, add=add, remedy=remake(folder))
    return to


def _student_stage(out: Path, listed: str) -> str:
    record = _record_there(out) if (out / REPORT).is_file() else None
    if record is None:
        raise CheckpointError(
            f"{out} holds no finished run to export; finish the run, or give --stage NAME; {listed}"
        )
    return record["student"]


def _no_model_of(stage: str, stages: Path) -> str:
    if not (stages / stage).is_dir():
        near = suggestion(stage, (folder.name for folder in stages.glob("*/")))
        return f'{stages.parent} has no stage "{stage}"{near or ";"}'
    problem = "gives no model" if (stages / stage / RESULT).is_file() else "has not finished"
    return f"stage {stage!r} of {stages.parent} {problem};"


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
