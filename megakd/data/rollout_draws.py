"""The source of every row of a step, as a function of (config, seed, step)."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from megakd.config.rollout import RolloutConfig, RowSource

_SOURCES: tuple[RowSource, ...] = ("rollout", "replay", "data")
_DRAW, _REPLAY = 1, 2
REPLAYED_STEPS = 100
"""The newest steps whose texts are replayed: a buffer of bounded size, as in DistiLLM."""


class RolloutDraws:
    """The random choices of a stage that trains on rollouts.

    Args:
        config: the section `rollout`.
        seed: seed of the run.
        rows: function that returns the number of rows of a step.
    """

    def __init__(self, config: RolloutConfig, *, seed: int) -> None:
        self._config, self._seed = config, seed
        self._generating: list[int] = []  # steps below `_known` that generate texts
        self._known = config.from_step

    def sources(self, step: int, rows: int) -> NDArray[np.str_]:
        """Return the source of each row of a step: `rollout`, `replay` or `data`.

        Before the first step that generates texts, there is nothing to replay, and `replay` means
        `rollout`.

        Args:
            step: number of the step.
            rows: number of rows of the step over all ranks.
        """
        if step < self._config.from_step:
            return np.full(rows, "data")
        drawn = self._drawn(step, rows)
        if "replay" in drawn and not self.replayable(step):
            drawn[drawn == "replay"] = "rollout"
        return drawn

    def replayable(self, step: int) -> list[int]:
        """Return the newest earlier steps that generate texts, in order.

        The first rows of a step decide: a step counts if its first row is a new text. So the list
        does not depend on the number of rows.
        """
        while self._known < step:
            first = self._drawn(self._known, 1)[0]
            if first == "rollout" or (first == "replay" and not self._generating):
                self._generating.append(self._known)
            self._known += 1
        end = bisect_left(self._generating, step)
        return self._generating[max(end - REPLAYED_STEPS, 0) : end]

    def replayed(self, step: int, position: int, *, count: int) -> tuple[int, float]:
        """Return the step whose text a row repeats, and which text, as a number from 0 to 1.

        Args:
            step: number of the step that learns.
            position: position of the row in the step.
            count: number of steps that `replayable` returns.
        """
        generator = np.random.default_rng([self._seed, _REPLAY, step, position])
        return int(generator.integers(count)), float(generator.random())

    def seed_of(self, step: int, row: int) -> int:
        """Return the seed of the text that continues a row's prompt at a step; below 2 ** 63."""
        key = f"{self._seed}:{step}:{row}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1

    def _drawn(self, step: int, rows: int) -> NDArray[np.str_]:
        shares = [self._config.mix.get(source, 0.0) for source in _SOURCES]
        generator = np.random.default_rng([self._seed, _DRAW, step])
        per_step = self._config.mix_per == "step"
        chosen = generator.choice(_SOURCES, size=1 if per_step else rows, p=shares)
        return np.repeat(chosen, rows) if per_step else chosen
