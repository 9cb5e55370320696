"""GLUE's unlabelled test splits, by the file of a submission that holds the predictions.

A run does not need these splits, so they are read only when a submission is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from megakd.config.task import TaskConfig
from megakd.data.cache import key_of
from megakd.data.columns import unlabelled_rows
from megakd.data.glue import HUB_NAME, TASKS, GlueTask, glue_name, task_folder
from megakd.data.hub import hub_table, load_hub
from megakd.data.readers import read_tsv
from megakd.data.tables import Table
from megakd.errors import DataError

logger = logging.getLogger(__name__)

_MNLI = {"MNLI-m": "test_matched", "MNLI-mm": "test_mismatched"}
SUBMISSIONS: Mapping[str, Mapping[str, str]] = {
    "cola": {"CoLA": "test"},
    "sst2": {"SST-2": "test"},
    "mrpc": {"MRPC": "test"},
    "stsb": {"STS-B": "test"},
    "qqp": {"QQP": "test"},
    "mnli": _MNLI,
    "mnli_matched": _MNLI,
    "mnli_mismatched": _MNLI,
    "qnli": {"QNLI": "test"},
    "rte": {"RTE": "test"},
    "wnli": {"WNLI": "test"},
}
"""Task -> stem of a submission's file -> name of the test split, on disk and on the Hub."""
DIAGNOSTIC = "AX"
DIAGNOSTIC_FILES = ("AX/AX.tsv", "AX.tsv", "diagnostic/diagnostic.tsv", "diagnostic.tsv")


class SubmissionRows(NamedTuple):
    """The rows that a submission has to predict.

    rows: by the stem of the submission's file, in the order of the test file, with the columns of
        `splits.Splits`; no row has a label.
    content_hash: sha256 of the sources of the rows.
    """

    rows: Mapping[str, Dataset]
    content_hash: str


def submission_rows(task: TaskConfig, *, cache_dir: Path) -> SubmissionRows:
    """Return the test rows of `glue/<task>`; for MNLI also GLUE's diagnostic set if available.

    Args:
        task: the task; only `dataset`, `data_dir` and `type` are used, and no rows are left out.
        cache_dir: folder in which the rows are kept.

    Raises:
        ConfigError: the task does not exist.
        DataError: a test file is missing or cannot be read.
    """
    name = glue_name(task.data_name)
    glue, on_disk = TASKS[name], task.data_dir is not None
    tables = _local(task.data_dir, name, glue) if task.data_dir is not None else _hub(name, glue)
    text = glue.text if on_disk else glue.hub_text or glue.text
    rows = {
        stem: unlabelled_rows(table, text, task, cache_dir=cache_dir)
        for stem, table in tables.items()
    }
    return SubmissionRows(rows, key_of({stem: table.digest for stem, table in tables.items()}))


def _local(data_dir: Path, name: str, glue: GlueTask) -> dict[str, Table]:
    folder = task_folder(data_dir, glue.folder or name)
    files = {stem: folder / f"{split}.tsv" for stem, split in SUBMISSIONS[name].items()}
    for stem, path in files.items():
        if not path.is_file():
            raise DataError(
                f"{path} does not exist, and the submission file {stem}.tsv needs GLUE's "
                "unlabelled test rows; put the file there, or remove task.data_dir to load the "
                "rows from the Hub"
            )
    if glue.folder == "mnli":
        files |= _diagnostic_file(folder)
    # All test files have a header, even CoLA's, although CoLA's training file has no header.
    return {stem: read_tsv(path) for stem, path in files.items()}


def _diagnostic_file(folder: Path) -> dict[str, Path]:
    places = [base / name for base in (folder, folder.parent) for name in DIAGNOSTIC_FILES]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        logger.info("%s.tsv is not written: %s has no AX/AX.tsv", DIAGNOSTIC, folder.parent)
    return {} if path is None else {DIAGNOSTIC: path}


def _hub(name: str, glue: GlueTask) -> dict[str, Table]:
    advice = "set task.data_dir to a folder with GLUE's own TSV files to work without the Hub"
    configuration = glue.folder or name
    found = load_hub(HUB_NAME, configuration, advice=advice)
    tables = {}
    for stem, split in SUBMISSIONS[name].items():
        if split not in found:
            raise DataError(f"{HUB_NAME} ({configuration}) has no split {split!r}; {advice}")
        tables[stem] = hub_table(f"{HUB_NAME} {configuration} ({split})", found[split])
    return tables | (_hub_diagnostic(advice) if configuration == "mnli" else {})


def _hub_diagnostic(advice: str) -> dict[str, Table]:
    try:
        found = load_hub(HUB_NAME, "ax", advice=advice)
    except DataError as error:
        logger.warning("%s.tsv is not written: %s", DIAGNOSTIC, error)
        return {}
    return {DIAGNOSTIC: hub_table(f"{HUB_NAME} ax (test)", found["test"])}
