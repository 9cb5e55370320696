"""Watches of a training: a student whose generated texts run away, and a rank that is slow.

A student that no longer ends its texts makes them longer, cut more often and of another entropy all
at once, often while the loss falls. The rule compares the two halves of the last `WINDOW` values of
a stage.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import median_low
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
SLOW, LOGS, LEAST_S = 1.3, 5, 0.1
"""A rank is slow if it computes longer than this multiple of the median, in so many logs in a row;
differences below the last number of seconds do not count."""


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


class TextWatch:
    """The values of one stage so far, which gives each kind of warning once."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._points = {kind: deque[TextPoint](maxlen=WINDOW) for kind in KINDS}
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
            change = _runaway([*self._points[kind]], series)
            if change and kind not in self._warned:
                self._warned.add(kind)
                text = f"{self._stage}, step {step}: {change}"
                warnings.append({"stage": self._stage, "kind": kind, "step": step, "message": text})
        return warnings


def _runaway(last: Sequence[TextPoint], series: Series) -> str:
    # Texts run away if length and truncation rise, and the entropy leaves its bound, all at once.
    if len(last) < WINDOW:
        return ""
    before, after = _mean(last[: WINDOW // 2]), _mean(last[WINDOW // 2 :])
    longer = after.length >= LONGER * before.length
    cut = after.truncated - before.truncated >= MORE_TRUNCATED
    low, high = sorted((before.entropy, after.entropy))
    if not (longer and cut and high >= ENTROPY_FACTOR * low):
        return ""
    return (
        f"the generated texts run away: over the last {WINDOW} values, {series.length} rose from "
        f"{before.length:.0f} to {after.length:.0f}, {series.truncated} from "
        f"{before.truncated:.0%} to {after.truncated:.0%}, and the {series.entropy_name} changed "
        f"from {before.entropy:.2g} to {after.entropy:.2g}; look at the texts, and lower "
        "train.learning_rate, or mix in rows of the data (rollout.mix)"
    )


def _mean(points: Sequence[TextPoint]) -> TextPoint:
    return TextPoint(*(sum(column) / len(points) for column in zip(*points, strict=True)))


def text_warnings(history: Iterable[Mapping[str, Any]]) -> list[WarningReport]:
    """Return the warnings of a run from the records of metrics.jsonl, in their order."""
    watches: dict[str, TextWatch] = {}
    warnings: list[WarningReport] = []
    for record in history:
        stage, step = record.get("stage"), record.get("step")
        if isinstance(stage, str) and isinstance(step, int):
            warnings += watches.setdefault(stage, TextWatch(stage)).add(step, record)
    return warnings


class SlowRank:
    """Tells which rank has been slow for some time."""

    def __init__(self) -> None:
        self._slowest, self._times = -1, 0

    def add(self, computing: Sequence[float]) -> int | None:
        """Add each rank's seconds of a log; return a rank that is slow for the `LOGS`-th time."""
        most, median = max(computing), median_low(computing)
        slowest = computing.index(most)
        if most < SLOW * median or most - median < LEAST_S:
            slowest = -1
        self._times = self._times + 1 if slowest == self._slowest else 1
        self._slowest = slowest
        return slowest if slowest >= 0 and self._times == LOGS else None
