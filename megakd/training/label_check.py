"""Check that generic labels of a model (LABEL_0, …) are in the order of the data's labels.

Names that match need no check. Generic names carry no information, so the model is tested: on the
validation rows it must be correct clearly more often than chance, and no other order may fit
clearly better. Data whose classes are numbers says an order itself: there a weak model is allowed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megakd.contract.batch import IGNORE
from megakd.errors import TeacherError
from megakd.models.label_order import generic_labels, listed
from megakd.models.source import ModelSource, ReadyTeacher
from megakd.training.assembly import Assembly

logger = logging.getLogger(__name__)
SMALLEST_MARGIN = 0.05
STANDARD_ERRORS = 2.0
REORDERING_ERRORS = 3.0


@dataclass(frozen=True, kw_only=True)
class LabelFit:
    """Fit between a model's outputs and the data's labels, output for label in the given order.

    score: balanced accuracy: the share of correct rows of each class that occurs, averaged.
    chance: 1 over the number of classes that occur, which is the score of any constant answer.
    margin: 2 standard errors of a model that guesses, and at least 0.05.
    rows: the number of rows with a label.
    better: the outputs by label that make clearly more rows correct; None: the order given.
    better_score: the balanced accuracy of that order.
    """

    score: float
    chance: float
    margin: float
    rows: int
    better: tuple[int, ...] | None = None
    better_score: float = math.nan

    def is_good(self, names: Sequence[str]) -> bool:
        """Return whether the outputs are in the order of classes with these names."""
        are_numbers = all(name.isdecimal() for name in names)
        return self.better is None and (are_numbers or self.score >= self.chance + self.margin)


def label_fit(outputs: Tensor, labels: Sequence[int] | NDArray[np.int64]) -> LabelFit:
    """Compare the largest output of every row with its label.

    Args:
        outputs: [N, C] logits.
        labels: [N] class numbers, -100 for a row without a label.
    """
    truth = np.asarray(labels)
    classes = outputs.shape[1]
    answers = outputs.argmax(dim=1).cpu().numpy()[truth != IGNORE]
    truth = truth[truth != IGNORE]
    counts = np.zeros((classes, classes))  # [label, output]
    np.add.at(counts, (truth, answers), 1)
    sizes = counts.sum(axis=1)
    occurring = sizes > 0
    number = max(1, int(occurring.sum()))
    chance = 1 / number
    error = math.sqrt(float((chance * (1 - chance) / sizes[occurring]).sum())) / number
    given = np.arange(classes)
    better = _clearly_better(counts, given)
    return LabelFit(
        score=_balanced(counts, given),
        chance=chance,
        margin=max(SMALLEST_MARGIN, STANDARD_ERRORS * error),
        rows=len(truth),
        better=None if better is None else tuple(better.tolist()),
        better_score=math.nan if better is None else _balanced(counts, better),
    )


def _balanced(counts: NDArray[Any], order: NDArray[Any]) -> float:
    sizes = counts.sum(axis=1)
    right = counts[np.arange(len(counts)), order]
    return float((right[sizes > 0] / sizes[sizes > 0]).mean()) if sizes.any() else math.nan


def _clearly_better(counts: NDArray[Any], given: NDArray[Any]) -> NDArray[Any] | None:
    from scipy.optimize import linear_sum_assignment

    _, order = linear_sum_assignment(counts, maximize=True)
    moved = order != given
    won = counts[given, order][moved].sum()
    lost = counts[given, given][moved].sum()
    return order if won - lost > REORDERING_ERRORS * math.sqrt(won + lost) else None


def require_fit(fit: LabelFit, source: ModelSource, names: Sequence[str], *, remedy: str) -> None:
    """Log a good fit; raise TeacherError on another. `remedy`: the option that accepts it."""
    both = _both(source, names)
    scored = (
        f"balanced accuracy {fit.score:.3f} on {fit.rows} labelled rows, where chance is "
        f"{fit.chance:.3f}"
    )
    if fit.is_good(names):
        logger.info("%s: %s: %s", source.where, both, scored)
        return
    hint = ""
    if fit.better is not None:
        generic = generic_labels(source.config) or ()
        fitting = [f"{generic[n]} is {name}" for n, name in zip(fit.better, names, strict=True)]
        hint = f"; the order {listed(fitting)} gives {fit.better_score:.3f}"
    raise TeacherError(
        f"{source.where} {source.name}: {both}: {scored}, and {fit.chance + fit.margin:.3f} is "
        f"required{hint}; write the right names into id2label of the model's config.json, or "
        f"{remedy} if this order is right"
    )


def tell_order(source: ModelSource, names: Sequence[str]) -> None:
    """Log an order that the user has confirmed."""
    logger.warning("%s: %s, as configured", source.where, _both(source, names))


def _both(source: ModelSource, names: Sequence[str]) -> str:
    generic = generic_labels(source.config) or ()
    return (
        f"the labels {listed(generic)} are read as the labels {listed(names)} of the data, in this "
        "order"
    )


def check_label_orders(assembly: Assembly) -> None:
    """Check every teacher of the config that has generic labels and no fine-tuning; a collective.

    A check costs one evaluation on the validation split. Its result is kept below `stages/`.
    """
    names = assembly.prepared.splits.label_names
    for name, spec in assembly.config.teacher_specs.items():
        source = assembly.prepared.sources[name]
        if spec.finetune is not None or source.folder is None or not needs_check(source, names):
            continue
        if spec.label_order == "data":
            tell_order(source, names)
        else:
            _check_once(assembly, ReadyTeacher(source, spec), name)


def _check_once(assembly: Assembly, ready: ReadyTeacher, name: str) -> None:
    names, source = assembly.prepared.splits.label_names, ready.source
    remedy = f"set {assembly.config.key_of(name)}.label_order to data"

    def measure() -> Mapping[str, float]:
        rows, dtype = assembly.prepared.encoded.validation, assembly.teacher_dtype(ready)
        logger.info(
            "%s: checking the order of the generic labels on %d rows", source.where, len(rows)
        )
        with assembly.loaded(source, ready.spec.deepspeed, dtype) as model:
            outputs = assembly.scorer().outputs(model.predict, rows)
        fit = label_fit(outputs, rows["label"])
        if not fit.is_good(names):  # only a good fit is kept
            require_fit(fit, source, names, remedy=remedy)
        return {key: getattr(fit, key) for key in ("score", "chance", "margin", "rows")}

    facts = {**assembly.frozen_facts(ready), "labels": list(names)}
    known = assembly.measured_once(f"{name}-labels", facts, measure)
    fit = LabelFit(**dict[str, Any](known.metrics))
    require_fit(fit, source, names, remedy=remedy)


def needs_check(source: ModelSource, names: Sequence[str]) -> bool:
    """Return true if a model's labels are generic and those of the data are others."""
    generic = generic_labels(source.config)
    return generic is not None and not all(name in generic for name in names)
