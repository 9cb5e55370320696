"""The GLUE tasks (Wang et al. 2019) of the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megakd.config.task import TaskConfig
from megakd.data.hub import hub_table, load_hub
from megakd.data.rows import Corpus, rows_of_tables
from megakd.errors import ConfigError, DataError, suggestion

HUB_NAME = "nyu-mll/glue"
PAIR, ACCURACY, BOTH = ("sentence1", "sentence2"), ("accuracy",), ("accuracy", "f1")
MNLI = (("premise", "hypothesis"), ACCURACY)
TASKS = {
    "cola": (("sentence",), ("matthews_correlation",)),
    "sst2": (("sentence",), ACCURACY),
    "mrpc": (PAIR, BOTH),
    "stsb": (PAIR, ("pearson", "spearman")),
    "qqp": (("question1", "question2"), BOTH),
    "mnli": MNLI,
    "mnli_matched": MNLI,
    "mnli_mismatched": MNLI,
    "qnli": (("question", "sentence"), ACCURACY),
    "rte": (PAIR, ACCURACY),
    "wnli": (PAIR, ACCURACY),
}
"""By name: the columns of text, and the metrics."""


def glue_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return the training and validation rows of `glue/<task>`; the test rows have no labels."""
    name = task.data_name.partition("/")[2]
    if name not in TASKS:
        raise ConfigError(
            f"task.dataset: there is no GLUE task {name!r}{suggestion(name, TASKS)}; the tasks are "
            f"{', '.join(TASKS)}"
        )
    text, metrics = TASKS[name]
    fitting = "regression" if name == "stsb" else "classification"
    if task.type != fitting:
        raise ConfigError(f"task.type: must be {fitting} for {task.dataset} (got {task.type})")
    configuration, _, part = name.partition("_")
    advice = (
        "to train without the Hub, name files in task.train_files and task.validation_files (a tsv "
        "file has no quotes), with task.text_columns and task.label_column"
    )
    held = f"validation_{part or 'matched'}" if configuration == "mnli" else "validation"
    loaded = load_hub(HUB_NAME, configuration, advice=advice)
    for key in ("train", held):
        if key not in loaded:
            raise DataError(f"{HUB_NAME} ({configuration}) has no split {key!r}; {advice}")
    return rows_of_tables(
        {
            "train": hub_table(f"{HUB_NAME} {configuration} (train)", loaded["train"]),
            "validation": hub_table(f"{HUB_NAME} {configuration} ({held})", loaded[held]),
        },
        dataclasses.replace(task, text_columns=text, label_column="label"),
        name=task.data_name,
        cache_dir=cache_dir,
        metrics=metrics,
    )
