"""Soft labels: the probabilities that the training rows hold, read strictly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from datasets import Dataset, List

from megakd.data.arrow import PLACE, with_column
from megakd.data.readers import parse_json
from megakd.data.records import BadRows, Record
from megakd.errors import DataError, listed, suggestion

SOFT = "soft_label"
"""Column of the training rows with the probabilities by class, float32; at first a text of JSON."""

ROUNDING = 0.01
"""By how much probabilities of one label may miss the sum of 1, as rounded numbers do."""


def soft_text(name: str, column: str, record: Record) -> str:
    """Return the probabilities of a row as JSON."""
    value = record.values.get(column)
    if value is None or value == "":
        raise DataError(
            f"{name}, {record.place}: column {column!r} (task.soft_labels) is empty, and every "
            "training row needs the answers of the teacher; fill it, or remove the row"
        )
    return value if isinstance(value, str) else json.dumps(value, default=float)


def with_soft_labels(rows: Dataset, names: Sequence[str], *, bad: BadRows) -> Dataset:
    """Return rows with their probabilities as float32 by class; those of one label sum to 1."""
    adds_up = not isinstance(rows.features["label"], List)
    soft, right = np.zeros((len(rows), len(names)), np.float32), list[int]()
    for number, (place, text) in enumerate(zip(rows[PLACE], rows[SOFT], strict=True)):
        with bad:
            soft[number] = _probabilities(place, text, names, adds_up=adds_up)
            right.append(number)
    bad.finish()
    if adds_up:
        soft[right] /= soft[right].sum(axis=1, keepdims=True)
    whole = rows if len(right) == len(rows) else rows.select(right)
    return with_column(whole, SOFT, soft[right])


def _probabilities(place: str, text: str, names: Sequence[str], *, adds_up: bool) -> list[float]:
    where = f"{place}: soft labels (task.soft_labels)"
    value: Any = parse_json(text, where)
    if isinstance(value, dict):
        by_name = cast("dict[str, Any]", value)
        other = next((name for name in by_name if name not in names), None)
        if other is not None:
            raise DataError(
                f"{where} name {other!r}, which is not one of the {len(names)} labels "
                f"({listed(list(names))}){suggestion(other, names)}"
            )
        value = [by_name.get(name) for name in names]
    if not isinstance(value, list) or len(value) != len(names):
        count = f"{len(value)} numbers" if isinstance(value, list) else repr(value)
        raise DataError(
            f"{where} are {count}, and there are {len(names)} labels ({listed(list(names))}); give "
            "a number for each, in this order or by name"
        )
    for name, one in zip(names, value, strict=True):
        is_number = isinstance(one, int | float) and not isinstance(one, bool)
        if not (is_number and 0 <= one <= 1):
            raise DataError(
                f"{where}: {name!r} has {one!r}, which is no probability from 0 to 1; apply a "
                f"{'softmax' if adds_up else 'sigmoid'} to logits, divide per cents by 100"
            )
    if adds_up and abs(sum(value) - 1) > ROUNDING:
        raise DataError(
            f"{where} sum to {sum(value):.3g}, and a row has one label; normalise them to a sum "
            "of 1, or write the labels as lists if a row may have several"
        )
    return value
