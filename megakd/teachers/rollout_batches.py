"""Training batches from texts that a model generates, and the draw of each step's source."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Generator as Iteration
from dataclasses import dataclass, field

import numpy as np

from megakd.config.rollout import RolloutConfig, rollout_block
from megakd.contract.batch import Batch, BatchSource
from megakd.contract.completions import (
    TOKENS_PER_TEXT,
    TRUNCATED,
    Generator,
    Rollout,
)
from megakd.data.collation import Collator
from megakd.data.loader import RowOrder, StepLoader
from megakd.data.step_layout import StepLayout, collate_step
from megakd.engine.collectives import doing, gather, on_main
from megakd.teachers.prompts import Prompts, columns_of
from megakd.teachers.rollout_store import RolloutStore

_DRAW = 1
"""Keeps the random numbers of the draw apart from others of the same seed and step."""


@dataclass(kw_only=True)
class RolloutSource(BatchSource):
    """The batches of a stage of which some steps learn from texts that a model generates.

    Which steps is a function of (config, seed, step). Texts are written to disk before the student
    learns from them, and a resumed run reads them from disk.

    continued: the rows of each step that continues prompts; each leaves room for a text.
    data: the steps that use the data; None if no step does.
    oldest: returns the first step from which the run may be resumed.
    waited_s: seconds that the loop has waited for batches, including the generation of texts.
    """

    config: RolloutConfig
    prompts: Prompts
    continued: RowOrder
    data: StepLoader | None
    collate: Collator
    layout: StepLayout
    generator: Generator
    store: RolloutStore
    seed: int
    oldest: Callable[[], int]
    waited_s: float = 0.0
    _sums: Counter[str] = field(default_factory=Counter)  # over the texts since the last log
    _ahead: tuple[Sequence[int], Callable[[], None]] = (), lambda: None

    def __post_init__(self) -> None:
        used = [self.continued] if self.config.mix else []
        used += [] if self.data is None else [self.data.step_rows]
        self.steps_per_epoch = max(order.steps_per_epoch for order in used)

    def iterate(self, start: int, stop: int) -> Iteration[Sequence[Batch], None, None]:
        for step in range(start, stop):
            began, following = time.perf_counter(), step + 1
            batches = self.step(step)
            # A remote generator makes the next texts while the student learns.
            if self.config.works_ahead and self.config.from_step <= following < stop:
                block = rollout_block(following, self.config)
                if block[0] == following and not on_main(lambda at=following: self.store.has(at)):
                    self._ahead = block, self._requested(block, version=step)
            self.waited_s += time.perf_counter() - began
            yield batches

    def step(self, step: int) -> Sequence[Batch]:
        if self.data is not None and not learns_from_texts(self.config, step, seed=self.seed):
            return self.data.step(step)
        if not on_main(lambda: self.store.has(step)):
            (steps, write), self._ahead = self._ahead, ((), lambda: None)
            if step not in steps:
                later = [at for at in rollout_block(step, self.config) if at >= step]
                write = self._requested(later, version=step)
            write()
        texts, routes = on_main(lambda: self.store.read(step)), self.prompts.routes
        self._sums.update(
            texts=len(texts),
            tokens=sum(len(text.completion) for text in texts),
            finished=sum(text.finished for text in texts),
            staleness=sum(step - text.version for text in texts),
        )
        batches = collate_step(
            columns_of(texts),
            self.layout,
            self.collate,
            routes=None if routes is None else routes[[text.row for text in texts]],
        )
        return [batch.extended(is_rollout=True) for batch in batches]

    def scalars(self) -> dict[str, float]:
        sums, self._sums = self._sums, Counter[str]()
        if not (texts := sums["texts"]):
            return {}
        return {
            TOKENS_PER_TEXT: sums["tokens"] / texts,
            TRUNCATED: 1 - sums["finished"] / texts,
            "rollout/staleness": sums["staleness"] / texts,
            "rollout/seconds": sums["microseconds"] / 1e6,
        }

    def _requested(self, steps: Sequence[int], *, version: int) -> Callable[[], None]:
        """Ask for the texts of some steps, and return what generates and writes them.

        Rank r generates the texts r, r + world and so on. Both are collectives.
        """
        every = [
            (at, int(row))
            for at in steps
            if learns_from_texts(self.config, at, seed=self.seed)
            for row in self.continued(at)
        ]
        if not every:  # all of the steps use the data
            return lambda: None
        rank, world = self.layout.shape.rank, self.layout.shape.world
        mine = every[rank::world]
        prompts = [self.prompts.prompt(row) for _, row in mine]
        seeds = [text_seed(self.seed, step, row) for step, row in mine]
        self.generator.update(version)
        texts = self.generator.begin(prompts, seeds, self.config.how)

        def write() -> None:
            began = time.perf_counter()
            with doing(f"generating {len(every)} texts at step {steps[0]}"):
                answers = zip(mine, prompts, texts(), seeds, strict=True)
            self._sums["microseconds"] += round(1e6 * (time.perf_counter() - began))
            parts = gather([Rollout(row, p, *text, version, s) for (_, row), p, text, s in answers])
            rollouts = [parts[number % world][number // world] for number in range(len(every))]
            by_step = {
                step: [text for (at, _), text in zip(every, rollouts, strict=True) if at == step]
                for step in steps
            }
            on_main(lambda: self._write(by_step))

        return write

    def _write(self, by_step: dict[int, list[Rollout]]) -> None:
        # Backwards: if the first step has its texts, the later steps have theirs too, and no texts
        # of one block are generated by two versions of the student.
        for step, texts in reversed(by_step.items()):
            if not self.store.has(step):
                self.store.write(step, texts)
        self.store.remove_before(self.oldest())


def learns_from_texts(config: RolloutConfig, step: int, *, seed: int) -> bool:
    """Return whether a step learns from texts, the same on all ranks."""
    draw = np.random.default_rng([seed, _DRAW, step]).random()
    return step >= config.from_step and draw < config.mix


def text_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of the text that continues a row's prompt at a step; below 2 ** 63."""
    key = f"{seed}:{step}:{row}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
