"""Matching of labels between data, teacher and student by name.

LABEL_n is the name of number n: it matches the class n of data whose classes are numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PretrainedConfig

from megakd.errors import ModelError


def label_order(
    model_config: PretrainedConfig, label_names: Sequence[str], *, where: str
) -> tuple[int, ...] | None:
    """Return `order` such that `logits[:, order]` is in the data's order of labels.

    None: the model's order is that of the data, or the task has no labels.
    """
    if not label_names:
        return None
    names = model_label_names(model_config)
    if len(names) != len(label_names):
        raise ModelError(
            f"{where}: the model has {len(names)} labels ({listed(names)}) and the data"
            f" {len(label_names)} ({listed(label_names)}); {_finetune(where)}give a model that"
            " was fine-tuned on these labels"
        )
    order = _columns(names, label_names)
    if sorted(order) != list(range(len(names))):
        raise ModelError(
            f"{where}: the model's labels ({listed(names)}) are not those of the data"
            f" ({listed(label_names)}); {_finetune(where)}write the data's labels into id2label of"
            " the model's config.json, in the order of its outputs"
        )
    return None if order == tuple(range(len(names))) else order


def labels_agree(model_config: PretrainedConfig, label_names: Sequence[str]) -> bool:
    """Return true if a stored head has the data's labels in order, or one score without labels."""
    names = model_label_names(model_config)
    if not label_names:
        return len(names) == 1
    return _columns(names, label_names) == tuple(range(len(names)))


def model_label_names(model_config: PretrainedConfig) -> tuple[str, ...]:
    """Return the names of a model's labels in the order of its logits."""
    return tuple(str(name) for _, name in sorted((model_config.id2label or {}).items()))


def set_labels(model_config: PretrainedConfig, label_names: Sequence[str]) -> None:
    """Write the data's labels into a config; no labels mean one score (regression)."""
    names = tuple(label_names) or ("LABEL_0",)
    model_config.id2label = dict(enumerate(names))
    model_config.label2id = {name: number for number, name in enumerate(names)}
    model_config.problem_type = "single_label_classification" if label_names else "regression"


def _columns(names: Sequence[str], label_names: Sequence[str]) -> tuple[int, ...]:
    """Return the model's column of each of the data's labels; -1 for a label it does not have.

    Upper and lower case are told apart only for names that differ in nothing else.
    """
    if all(map(str.isdecimal, label_names)):
        names = [re.sub(r"^LABEL_(\d+)$", r"\1", name) for name in names]
    columns = {name: column for column, name in enumerate(names)}
    by_fold: dict[str, list[int]] = {}
    for name, column in columns.items():
        by_fold.setdefault(name.casefold(), []).append(column)

    def column_of(label: str) -> int:
        alike = by_fold.get(label.casefold(), [])
        return columns.get(label, alike[0] if len(alike) == 1 else -1)

    return tuple(map(column_of, label_names))


def _finetune(where: str) -> str:
    owner = where.removesuffix(".model")
    return f"set {owner}.finetune or " if owner.startswith("teacher") else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return the first names as text for a message."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
