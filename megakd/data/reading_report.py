"""What was read, in a line, and labels that are silently something else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from datasets.fingerprint import generate_fingerprint

from megakd.data.arrow import column_of, remembered
from megakd.data.choosing import is_labelled, prompt_keys
from megakd.data.splits import Splits
from megakd.errors import listed

SEPARATORS = (",", ";", "|")
NO_LABEL = frozenset(("n/a", "na", "none", "null", "nan", "nil", "-", "?", "unknown", "undefined"))
"""Words that may stand for a missing label, in lower case."""


def read_line(splits: Splits) -> str:
    """Return the sizes of the splits: `train 3000 rows, 64 classes of 13 to 64 rows; …`."""
    if splits.stream is not None:
        parts = ["train: a stream"]
    else:
        rows, labelled = len(splits.train), int(is_labelled(splits.train).sum())
        parts = [f"train {rows:,} rows" + (f", {labelled:,} labelled" if labelled < rows else "")]
        counts = _counts(splits.train, len(splits.label_names))
        if counts:
            parts[0] += f", {len(counts)} classes of {min(counts):,} to {max(counts):,} rows"
        if counts and splits.multi_label:
            parts[0] += f", {sum(counts) / max(1, labelled):.2f} labels a row"
    for name, rows in (("validation", splits.validation), ("test", splits.test)):
        if rows is not None:
            parts.append(f"{name} {len(rows):,}")
    return "; ".join(parts)


def read_warnings(splits: Splits, *, step_rows: int) -> Iterator[str]:
    """Yield warnings on labels and rows, each with counts; `step_rows`: rows of a step."""
    names = splits.label_names
    if names and splits.stream is None:
        yield from _of_labels(names, _counts(splits.train, len(names)))
    if splits.stream is None and 0 < len(splits.train) < step_rows:
        yield (
            f"the {len(splits.train)} training rows are fewer than the {step_rows} of a step, "
            "which has these alone; lower train.per_device_train_batch_size"
        )
    train, held_out = splits.train, splits.held_out
    if len(train) == 0 or (splits.is_cut and splits.test is None):
        return  # a cut leaves no text and no prompt on both sides

    def count() -> int:
        return int(np.isin(prompt_keys(held_out), prompt_keys(train)).sum())

    again = remembered(count, "again", *map(generate_fingerprint, (train, held_out)))
    if again:
        yield (
            f"{again:,} of the {len(held_out):,} held-out rows are training rows too, so the "
            "scores are too good; remove them from one of the two"
        )


def _of_labels(names: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    rows = dict(zip(names, counts, strict=True))
    alike = defaultdict[str, list[str]](list)
    for name in names:
        alike[" ".join(name.casefold().replace("_", " ").split())].append(name)
    for same in (same for same in alike.values() if len(same) > 1):
        yield f"the classes {_shown(same, rows)} differ only in case or spaces; is this one class?"
    missing = [name for name in names if name.strip().casefold() in NO_LABEL]
    if missing:
        yield f"the class {_shown(missing, rows)}: if it stands for no label, empty its cells"
    joined = [
        name
        for name in names
        for parts in (name.split(separator) for separator in SEPARATORS)
        if len(parts) > 1 and all(part.strip() in rows for part in parts)
    ]
    if joined:
        yield (
            f"{len(joined)} classes are several others in one cell: {_shown(joined, rows)}; "
            "a row has one class here, so each combination is learned as a class of its own; set "
            "task.label_separator to give a row several labels"
        )
    single = [name for name in names if rows[name] == 1]
    if single:
        yield (
            f"{len(single)} classes have one training row: {_shown(single, rows)}; give them more "
            "rows, or join them"
        )


def _shown(names: Sequence[str], rows: dict[str, int]) -> str:
    return listed([f'"{name}" ({rows[name]:,} rows)' for name in names])


def _counts(rows: Dataset, classes: int) -> list[int]:
    if not classes or "label" not in rows.column_names:
        return []
    labels = column_of(rows, "label")
    if labels.ndim == 2:
        return (labels == 1).sum(axis=0).tolist()
    return np.bincount(labels[labels >= 0], minlength=classes).tolist()
