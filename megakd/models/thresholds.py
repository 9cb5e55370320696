"""The probabilities from which a row with any number of labels has a label: one, or one by label.

The config of a model has them as `threshold`, a number or a list in the order of its outputs; so
has report.json. An evaluation has only numbers: `threshold`, or `<label>/threshold`, which figures
draw as lines by label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from transformers import PretrainedConfig

from megakd.config.task import STUDENT, TEACHER, THRESHOLD
from megakd.errors import ModelError
from megakd.models.fitting import head_order, model_label_names

Threshold = float | tuple[float, ...]


def named_threshold(threshold: Threshold, labels: Sequence[str]) -> dict[str, float]:
    """Return a threshold as values of an evaluation."""
    if not isinstance(threshold, tuple):
        return {THRESHOLD: threshold}
    return {f"{label}/{THRESHOLD}": one for label, one in zip(labels, threshold, strict=True)}


def is_threshold(name: str) -> bool:
    """Return whether a value of an evaluation is a threshold."""
    return name.rpartition("/")[2] == THRESHOLD


def threshold_in(values: Mapping[str, float]) -> Threshold | None:
    """Return the threshold among the values of an evaluation; None: its rows have one label."""
    by_label = tuple(values[name] for name in values if is_threshold(name) and name != THRESHOLD)
    return by_label or values.get(THRESHOLD)


def with_threshold(values: Mapping[str, float]) -> dict[str, float | Threshold]:
    """Return the values of an evaluation as report.json has them, with `threshold` as one key."""
    scores: dict[str, float | Threshold] = {
        name: value for name, value in values.items() if not is_threshold(name)
    }
    threshold = threshold_in(values)
    return scores if threshold is None else {**scores, THRESHOLD: threshold}


def store_threshold(config: object, values: Mapping[str, float]) -> None:
    """Write the threshold of an evaluation, if it has one, into the config of its model."""
    if (threshold := threshold_in(values)) is not None:
        setattr(config, THRESHOLD, [*threshold] if isinstance(threshold, tuple) else threshold)


def stored_threshold(config: object, labels: Sequence[str] = ()) -> Threshold | None:
    """Return the threshold in the config of a model, by the data's labels; None: it has none.

    Raises:
        ModelError: it is neither a number nor one for each label.
    """
    value, source = getattr(config, THRESHOLD, None), cast("PretrainedConfig", config)
    if value is None:
        return None
    names = model_label_names(source)
    numbers = tuple(value) if isinstance(value, list) else (value,)
    is_share = all(isinstance(one, int | float) and 0 <= one <= 1 for one in numbers)
    if not is_share or (isinstance(value, list) and len(numbers) != len(names)):
        raise ModelError(
            f"{THRESHOLD} in config.json is {value!r}, and the model has {len(names)} labels; "
            "write a number from 0 to 1, or a list of one for each label in the order of id2label"
        )
    if not isinstance(value, list):
        return value
    order = head_order(source, labels) if labels else None
    return numbers if order is None else tuple(numbers[number] for number in order)


def deciding_threshold(config: PretrainedConfig) -> Threshold:
    """Return the threshold in the config of a model, else 0.5."""
    threshold = stored_threshold(config)
    return 0.5 if threshold is None else threshold


def threshold_lines(report: Mapping[str, object]) -> Iterator[str]:
    """Yield the line of a report that states the thresholds, if a row may have several labels."""
    values = {name: report.get(f"{name}.{THRESHOLD}") for name in (STUDENT, TEACHER)}
    if texts := [f"{name} {_as_text(one)}" for name, one in values.items() if one is not None]:
        chosen = "a row has a label from this probability on, chosen on the validation rows"
        yield f"{THRESHOLD}: {', '.join(texts)}; {chosen}"


def _as_text(threshold: object) -> str:
    match threshold:
        case [*several]:
            return f"{min(several):g} to {max(several):g} by label"
        case _:
            return f"{threshold:g}"
