"""Weights of the classes in `hard_cross_entropy`, in the order of the data's labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megakd.contract.terms import HardCrossEntropy, TermConfig
from megakd.data.splits import Splits
from megakd.errors import ConfigError, suggestion


def with_class_weights(terms: Sequence[TermConfig], splits: Splits) -> tuple[TermConfig, ...]:
    """Return the terms with a weight for every label, in the order of the data's labels.

    `balanced` gives label c the weight rows / (labels · rows of c), counted over the labelled
    training rows, so that the mean weight of these rows is 1.
    """
    return _with_weights(terms, lambda term: _in_order(term, splits))


def with_even_weights(terms: Sequence[TermConfig], classes: int) -> tuple[TermConfig, ...]:
    """Return the terms with weight 1 for every label, for a memory plan without data."""
    even = {str(number): 1.0 for number in range(classes)}
    return _with_weights(terms, lambda _: even)


def _with_weights(
    terms: Sequence[TermConfig], weights_of: Callable[[HardCrossEntropy], dict[str, float]]
) -> tuple[TermConfig, ...]:
    return tuple(
        dataclasses.replace(term, class_weights=weights_of(term))
        if isinstance(term, HardCrossEntropy) and term.class_weights is not None
        else term
        for term in terms
    )


def _in_order(term: HardCrossEntropy, splits: Splits) -> dict[str, float]:
    given, labels = term.class_weights, splits.label_names
    if not isinstance(given, Mapping):
        return _balanced(labels, np.asarray(splits.train["label"]))
    for label in given:
        if label not in labels:
            raise ConfigError(
                "hard_cross_entropy.class_weights: the data have no label "
                f'"{label}"{suggestion(label, labels)} (known: '
                f"{', '.join(labels[:10])})"
            )
    missing = [label for label in labels if label not in given]
    if missing:
        raise ConfigError(
            f"hard_cross_entropy.class_weights: no weight for {', '.join(missing[:10])}; set a "
            "weight for every label (1 is neutral)"
        )
    return {label: given[label] for label in labels}


def _balanced(labels: Sequence[str], numbers: np.ndarray) -> dict[str, float]:
    counts = np.bincount(numbers[numbers >= 0], minlength=len(labels))
    absent = [label for label, count in zip(labels, counts, strict=True) if count == 0]
    if absent:
        raise ConfigError(
            "hard_cross_entropy.class_weights: balanced divides by the number of rows of a label, "
            f"and no training row has the label {', '.join(absent[:10])}; set the weights by label"
        )
    return dict(zip(labels, (counts.sum() / (len(labels) * counts)).tolist(), strict=True))
