"""The rows of all sources of a mixture; see `mixed_rows` for those of an epoch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from megakd.config.task import TaskConfig
from megakd.data.arrow import key_of
from megakd.data.files import files_table, matching_files, named_files, refuse_shared
from megakd.data.kinds import RowKind, row_teacher
from megakd.data.rows import DEFAULT_METRICS, Corpus, rows_of
from megakd.data.tables import SplitName


def mixture_rows(task: TaskConfig, *, cache_dir: Path) -> Corpus:
    """Return the rows of all sources of `task.mixture`, and of the validation and test files.

    Documents become conversations without a prompt, which are not packed.
    """
    sources, held = task.mixture or {}, named_files(task)
    keys = {name: f"task.mixture.{name}.files" for name in sources}
    paths = {key: matching_files(sources[name].files, key) for name, key in keys.items()}
    paths |= {f"task.{split}_files": files for split, files in held.items()}
    refuse_shared(paths)
    tables = {key: files_table(files, key) for key, files in paths.items()}
    kinds = {key: RowKind.of(task, table, as_chat=True) for key, table in tables.items()}
    for name, key in keys.items():
        teacher = row_teacher(tables[key], task.teacher_column, sources[name].teacher)
        kinds[key] = replace(kinds[key], teacher=teacher)
    names = {key: name for name, key in keys.items()}
    rows = {
        key: rows_of(table, kinds[key], task, cache_dir=cache_dir, source=names.get(key))
        for key, table in tables.items()
    }
    splits: dict[SplitName, Dataset] = {"train": concatenate_datasets([rows[key] for key in names])}
    splits |= {split: rows[f"task.{split}_files"] for split in held}
    digests = [(key, table.digest, kinds[key].fields) for key, table in tables.items()]
    teachers = [task.teacher_column, *(part.teacher for part in sources.values())]
    return Corpus(
        name="task.mixture",
        splits=splits,
        classes=None,
        metrics=DEFAULT_METRICS[task.type],
        source_hash=key_of("mixture", digests, *(teachers if any(teachers) else ())),
    )
