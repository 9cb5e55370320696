"""Matching of labels between data, teacher and student by name, never by number alone."""

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
    if generic_labels(model_config):
        return None  # `label_check` verifies this order
    order = _columns(names, label_names)
    if sorted(order) != list(range(len(names))):
        raise ModelError(
            f"{where}: the model's labels ({listed(names)}) are not those of the data"
            f" ({listed(label_names)}); {_finetune(where)}correct id2label in the model's"
            " config.json"
        )
    return None if order == tuple(range(len(names))) else order


def labels_agree(model_config: PretrainedConfig, label_names: Sequence[str]) -> bool:
    """Return true if a stored head has the data's labels in order, or one score without labels."""
    names = model_label_names(model_config)
    if not label_names:
        return len(names) == 1
    same = _columns(names, label_names) == tuple(range(len(names)))
    return same or (generic_labels(model_config) is not None and len(names) == len(label_names))


def generic_labels(model_config: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the names of a model's labels if all of them are LABEL_0, LABEL_1, …; else None."""
    names = model_label_names(model_config)
    return names if names and all(re.fullmatch(r"LABEL_\d+", name) for name in names) else None


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
