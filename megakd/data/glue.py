"""The GLUE tasks (Wang et al. 2019), from their TSV folders or from the Hub.

Each folder is read as published by GLUE: without quoting, CoLA without a header, MRPC with a byte
order mark, labels as numbers or words. `test.tsv` has no labels.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megakd.config.task import TaskConfig
from megakd.data.hub import hub_table, load_hub
from megakd.data.labels import Classes
from megakd.data.readers import read_tsv
from megakd.data.rows import Corpus, rows_of_tables
from megakd.data.tables import SplitName, Table
from megakd.errors import ConfigError, DataError

HUB_NAME = "nyu-mll/glue"
HUB_UNLABELLED = -1
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """Metrics, classes and file format of one GLUE task.

    text, label: columns of the TSV files.
    hub_text: columns of text on the Hub if they differ.
    classes: class names in GLUE's order; empty for regression.
    folder: name of the task's folder and of its Hub configuration if it differs from the task.
    numbered: whether the files hold class numbers instead of names.
    validation: stem of the validation file.
    """

    text: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    classes: tuple[str, ...] = ENTAILMENT
    label: str = "label"
    hub_text: tuple[str, ...] | None = None
    folder: str | None = None
    numbered: bool = True
    header: tuple[str, ...] | None = None
    validation: str = "dev"
    hub_validation: str = "validation"
    skip_broken: bool = False


def _mnli(which: str) -> GlueTask:
    return GlueTask(
        text=("sentence1", "sentence2"),
        hub_text=("premise", "hypothesis"),
        classes=("entailment", "neutral", "contradiction"),
        label="gold_label",
        numbered=False,
        folder="mnli",
        validation=f"dev_{which}",
        hub_validation=f"validation_{which}",
    )


TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        text=("sentence",),
        metrics=("matthews_correlation",),
        classes=("unacceptable", "acceptable"),
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask(text=("sentence",), classes=("negative", "positive")),
    "mrpc": GlueTask(
        text=("#1 String", "#2 String"),
        hub_text=("sentence1", "sentence2"),
        metrics=("accuracy", "f1"),
        classes=("not_equivalent", "equivalent"),
        label="Quality",
    ),
    "stsb": GlueTask(
        text=("sentence1", "sentence2"), metrics=("pearson", "spearman"), classes=(), label="score"
    ),
    # A few lines of the published train.tsv are broken; all readers of GLUE skip these lines.
    "qqp": GlueTask(
        text=("question1", "question2"),
        metrics=("accuracy", "f1"),
        classes=("not_duplicate", "duplicate"),
        label="is_duplicate",
        skip_broken=True,
    ),
    "mnli": _mnli("matched"),
    "mnli_matched": _mnli("matched"),
    "mnli_mismatched": _mnli("mismatched"),
    "qnli": GlueTask(text=("question", "sentence"), numbered=False),
    "rte": GlueTask(text=("sentence1", "sentence2"), numbered=False),
    "wnli": GlueTask(text=("sentence1", "sentence2"), classes=ENTAILMENT[::-1]),
}


def glue_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return the rows of `glue/<task>`."""
    name = glue_name(task.data_name)
    glue = TASKS[name]
    fitting = "classification" if glue.classes else "regression"
    if task.type != fitting:
        raise ConfigError(f"task.type: must be {fitting} for {task.dataset} (got {task.type})")
    tables: dict[SplitName, Table]
    if task.data_dir is None:
        tables, text, label = _hub(name, glue), glue.hub_text or glue.text, "label"
        numbered, unlabelled = True, frozenset({HUB_UNLABELLED})
    else:
        folder = task_folder(task.data_dir, glue.folder or name)
        files: dict[SplitName, str] = {"train": "train.tsv", "validation": f"{glue.validation}.tsv"}
        tables = {
            split: read_tsv(folder / file, header=glue.header, skip_broken=glue.skip_broken)
            for split, file in files.items()
        }
        text, label, numbered, unlabelled = glue.text, glue.label, glue.numbered, frozenset[int]()
    classes = Classes(glue.classes, numbered=numbered, unlabelled=unlabelled)
    return rows_of_tables(
        tables,
        dataclasses.replace(task, text_columns=text, label_column=label),
        name=task.data_name,
        cache_dir=cache_dir,
        classes=classes if glue.classes else None,
        metrics=glue.metrics,
    )


def glue_name(dataset: str) -> str:
    """Return the task of `glue/<task>` for any spelling, such as SST-2 or sst2."""
    written = dataset.partition("/")[2]
    names = {_plain(name): name for name in TASKS}
    if _plain(written) in names:
        return names[_plain(written)]
    close = difflib.get_close_matches(_plain(written), names, n=1, cutoff=0.5)
    hint = f"did you mean glue/{names[close[0]]}? " if close else ""
    raise ConfigError(
        f"task.dataset: there is no GLUE task {written!r}; {hint}the tasks are {', '.join(TASKS)}"
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def task_folder(data_dir: Path, name: str) -> Path:
    """Return the folder of a task's TSV files: `data_dir`, or its subfolder for the task."""
    if not data_dir.is_dir():
        raise DataError(f"task.data_dir: the folder {data_dir} does not exist")
    if (data_dir / "train.tsv").exists():
        return data_dir
    for folder in sorted(data_dir.iterdir()):
        if folder.is_dir() and _plain(folder.name) == _plain(name):
            return folder
    raise DataError(
        f"task.data_dir: {data_dir / 'train.tsv'} does not exist, and {data_dir} has no folder for "
        f"the GLUE task {name}; set task.data_dir to the folder that holds train.tsv"
    )


def _hub(name: str, glue: GlueTask) -> dict[SplitName, Table]:
    advice = (
        "set task.data_dir to a folder with GLUE's own TSV files (train.tsv, "
        f"{glue.validation}.tsv) to train without the Hub"
    )
    configuration = glue.folder or name
    loaded = load_hub(HUB_NAME, configuration, advice=advice)
    splits: dict[SplitName, str] = {"train": "train", "validation": glue.hub_validation}
    missing = [key for key in splits.values() if key not in loaded]
    if missing:
        raise DataError(f"{HUB_NAME} ({configuration}) has no split {missing[0]!r}; {advice}")
    return {
        split: hub_table(f"{HUB_NAME} {configuration} ({key})", loaded[key])
        for split, key in splits.items()
    }
