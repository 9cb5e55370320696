"""Warning about a student whose generated texts run away: longer, cut more often, other entropy.

A student that no longer ends its texts makes all three change together, often while the loss falls.
The rule compares the two halves of the last `WINDOW` values of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from megakd.contract.completions import DISTINCT, TOKENS_PER_TEXT, TRUNCATED
from megakd.contract.results import WarningReport

WINDOW = 6
"""Number of the last evaluations, or of the last logged values of rollouts, that are compared."""
LONGER = 1.25
"""Least ratio of the mean lengths of the second and the first half of the window."""
MORE_TRUNCATED = 0.1
"""Least rise of the mean share of truncated texts, a share of all texts."""
ENTROPY_FACTOR = 1.5
"""Least ratio of the mean entropies of the two halves, in either direction."""


class Series(NamedTuple):
    """Keys of the log that are watched.

    length: tokens per text. truncated: share of truncated texts. entropy: entropy of the student,
    or another measure of how varied the texts are. entropy_name: its name in the warning.
    """

    length: str
    truncated: str
    entropy: str
    entropy_name: str


KINDS = {
    "evaluation": Series(
        "eval/text_tokens", "eval/text_truncated", "eval/text_entropy", "entropy of the student"
    ),
    # Training measures no entropy: repetition is what its texts show.
    "rollout": Series(TOKENS_PER_TEXT, TRUNCATED, DISTINCT, "share of distinct pairs of tokens"),
}
"""Kinds of generated texts; the first are those of `eval.generation`."""


class TextPoint(NamedTuple):
    """Length, share of truncated texts, and entropy of the texts at one step."""

    length: float
    truncated: float
    entropy: float


def means_of_runaway(points: Sequence[TextPoint]) -> tuple[TextPoint, TextPoint] | None:
    """Return the means of both halves of the last `WINDOW` points if texts run away, else None.

    Texts run away if length and truncation rise, and the entropy leaves its bound, all at once.
    """
    last = points[-WINDOW:]
    if len(last) < WINDOW:
        return None
    before, after = _mean(last[: WINDOW // 2]), _mean(last[WINDOW // 2 :])
    longer = after.length >= LONGER * before.length
    cut = after.truncated - before.truncated >= MORE_TRUNCATED
    low, high = sorted((before.entropy, after.entropy))
    return (before, after) if longer and cut and high >= ENTROPY_FACTOR * low else None


def _mean(points: Sequence[TextPoint]) -> TextPoint:
    columns = zip(*points, strict=True)
    return TextPoint(*(sum(column) / len(points) for column in columns))


class TextWatch:
    """The values of one stage so far, which gives each kind of warning once."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._points: dict[str, list[TextPoint]] = {kind: [] for kind in KINDS}
        self._warned: set[str] = set()

    def add(self, step: int, values: Mapping[str, Any]) -> list[WarningReport]:
        """Add the values of a step, in order, and return the new warnings."""
        warnings: list[WarningReport] = []
        for kind, series in KINDS.items():
            numbers = [values.get(key) for key in series[:3]]
            if not all(isinstance(number, int | float) for number in numbers):
                continue
            point = TextPoint(*map(float, numbers))  # type: ignore[arg-type]
            if not all(map(math.isfinite, point)):
                continue
            self._points[kind].append(point)
            means = means_of_runaway(self._points[kind])
            if means is not None and kind not in self._warned:
                self._warned.add(kind)
                text = _message(self._stage, step, series, means)
                warnings.append({"stage": self._stage, "kind": kind, "step": step, "message": text})
        return warnings


def _message(stage: str, step: int, series: Series, means: tuple[TextPoint, TextPoint]) -> str:
    before, after = means
    return (
        f"{stage}, step {step}: the generated texts run away: over the last {WINDOW} values, "
        f"{series.length} rose from {before.length:.0f} to {after.length:.0f}, {series.truncated} "
        f"from {before.truncated:.0%} to {after.truncated:.0%}, and the {series.entropy_name} "
        f"changed from {before.entropy:.2g} to {after.entropy:.2g}; look at the texts, and lower "
        "train.learning_rate, or mix in rows of the data (rollout.mix)"
    )


def text_warnings(history: Iterable[Mapping[str, Any]]) -> list[WarningReport]:
    """Return the warnings of a run from the records of metrics.jsonl, in their order."""
    watches: dict[str, TextWatch] = {}
    warnings: list[WarningReport] = []
    for record in history:
        stage, step = record.get("stage"), record.get("step")
        if isinstance(stage, str) and isinstance(step, int):
            warnings += watches.setdefault(stage, TextWatch(stage)).add(step, record)
    return warnings
