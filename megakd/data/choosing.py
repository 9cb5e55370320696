"""Selection of rows by a hash of their text, independent of machine and order of the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from datasets import Dataset, Features

from megakd.contract.batch import IGNORE
from megakd.errors import DataError

VALIDATION_FRACTION = 0.05
HASH_RANGE = 2**64
ROWS_PER_READ = 1000

Keys = np.ndarray[tuple[int], np.dtype[np.uint64]]
Chosen = np.ndarray[tuple[int], np.dtype[np.bool_]]


def text_hash(text: str, *, salt: str = "") -> int:
    """Return a number below 2**64 that depends only on the text and the salt."""
    digest = hashlib.sha256(f"{salt}\0{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def row_keys(rows: Dataset, *, salt: str = "") -> Keys:
    """Return one hash per row, of the text or the pair of texts."""
    return np.fromiter(
        (text_hash(text, salt=salt) for text in _texts(rows)), dtype=np.uint64, count=len(rows)
    )


def is_labelled(rows: Dataset) -> Chosen:
    """Return a bool per row: whether the row carries a label."""
    if "label" not in rows.column_names:
        return np.ones(len(rows), dtype=np.bool_)
    labels = _labels(rows)
    return ~np.isnan(labels) if labels.dtype.kind == "f" else labels != IGNORE


def cut_validation(rows: Dataset, *, name: str) -> tuple[Dataset, Dataset]:
    """Split the training rows into (rest, validation), with 5 % of the labelled rows, at least one.

    Rows with equal text stay together, so that no held-out text is trained on.

    Raises:
        DataError: there are fewer than two different texts, or no labels.
    """
    keys, labelled = row_keys(rows), is_labelled(rows)
    if not labelled.any() or np.unique(keys).size < 2:
        raise DataError(
            f"{name} has no validation split, and megakd cannot cut one from its {len(rows)} "
            "row(s), because a cut needs 2 different texts and at least one label; add a file "
            "validation.*"
        )
    held = labelled & (keys < np.uint64(int(VALIDATION_FRACTION * HASH_RANGE)))
    rest = ~np.isin(keys, keys[held])
    if not held.any() or not rest.any():
        held = labelled & (keys == keys[labelled].min())
        rest = ~np.isin(keys, keys[held])
    return rows.select(np.flatnonzero(rest)), rows.select(np.flatnonzero(held))


def at_most(rows: Dataset, count: int | None) -> Dataset:
    """Return the `count` rows with the lowest hashes, in their order; all rows if None.

    Labelled rows come first, because rows without a label are not scored.
    """
    if count is None or count >= len(rows):
        return rows
    order = np.lexsort((row_keys(rows), ~is_labelled(rows)))
    return rows.select(np.sort(order[:count]))


def keep_labels(rows: Dataset, count: int | None, *, seed: int, name: str) -> Dataset:
    """Return the rows with only `count` labels, chosen by a hash of seed and text.

    Raises:
        DataError: fewer than `count` rows carry a label.
    """
    if count is None:
        return rows
    candidates = np.flatnonzero(is_labelled(rows))
    if count > candidates.size:
        raise DataError(
            f"task.labelled_examples: {count}, but the training split of {name} has "
            f"{candidates.size} labelled rows; set at most that number"
        )
    keys = row_keys(rows, salt=str(seed))[candidates]
    kept = candidates[_lowest(keys, count)]
    labels = _labels(rows)
    fewer = np.full_like(labels, np.nan if labels.dtype.kind == "f" else IGNORE)
    fewer[kept] = labels[kept]
    feature = rows.features["label"]
    fresh = Dataset.from_dict({"label": fewer}, features=Features({"label": feature}))
    return rows.remove_columns("label").add_column("label", fresh.data.column("label"))


def _lowest(keys: Keys, count: int) -> Chosen:
    # Equal texts have equal keys: the earlier row is chosen first.
    chosen = np.zeros(keys.size, dtype=np.bool_)
    chosen[np.argsort(keys, kind="stable")[:count]] = True
    return chosen


def _labels(rows: Dataset) -> np.ndarray:
    return rows.with_format("numpy", columns=["label"])[:]["label"]


def _texts(rows: Dataset) -> Iterator[str]:
    pair = "text_pair" in rows.column_names
    for start in range(0, len(rows), ROWS_PER_READ):
        batch = rows[start : start + ROWS_PER_READ]
        if pair:
            yield from map("\0".join, zip(batch["text"], batch["text_pair"], strict=True))
        else:
            yield from batch["text"]
