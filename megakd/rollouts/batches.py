"""Training batches from texts that a model generates, and the draw of each step's source."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Generator as Iteration
from functools import partial
from typing import NamedTuple

import numpy as np

from megakd.config.rollout import RolloutConfig, rollout_block
from megakd.contract.batch import Batch, BatchSource
from megakd.contract.completions import (
    TOKENS_PER_TEXT,
    TRUNCATED,
    Generator,
    RemoteGenerator,
    Rollout,
)
from megakd.data.collation import Collator
from megakd.data.loader import RowOrder, StepLoader
from megakd.data.step_layout import StepLayout, collate_step
from megakd.engine.collectives import doing, gather, on_main
from megakd.rollouts.prompts import Prompts, columns_of
from megakd.rollouts.store import RolloutStore

_DRAW = 1
"""Keeps the random numbers of the draw apart from others of the same seed and step."""


class StepRows(NamedTuple):
    """The data behind a stage's rollouts.

    continued: the rows of each step that continues prompts.
    data: the steps that use the data; None if no step does.
    """

    prompts: Prompts
    continued: RowOrder
    data: StepLoader | None
    collate: Collator
    layout: StepLayout


class _Request(NamedTuple):
    """Texts that are generated together; rank r generates the texts r, r + world and so on.

    steps: the steps that learn from the texts, in order; those whose texts are on disk keep them.
    total: number of texts over all ranks.
    made: generates the texts of this rank, or waits for a remote generator, and returns each with
        its step; a collective.
    """

    steps: Sequence[int]
    total: int
    made: Callable[[], list[tuple[int, Rollout]]]


class RolloutSource(BatchSource):
    """The batches of a stage of which some steps learn from texts that a model generates.

    Which steps is a function of (config, seed, step). `rows.continued` have a prompt that leaves
    room for a text. Texts are written to disk before the student learns from them, and a resumed
    run reads them from disk. `oldest` returns the first step from which the run may be resumed.
    """

    def __init__(
        self,
        rows: StepRows,
        config: RolloutConfig,
        *,
        generator: Generator,
        store: RolloutStore,
        seed: int,
        oldest: Callable[[], int],
    ) -> None:
        self._rows, self._config, self._seed = rows, config, seed
        self._generator, self._store, self._oldest = generator, store, oldest
        used = [rows.continued] if config.mix else []
        used += [] if rows.data is None else [rows.data.step_rows]
        self.steps_per_epoch = max(order.steps_per_epoch for order in used)
        self.waited_s = 0.0
        """Seconds that the loop has waited for batches, including the generation of texts."""
        self._sums = Counter[str]()  # over the texts since the last log
        self._ahead: _Request | None = None

    def iterate(self, start: int, stop: int) -> Iteration[Sequence[Batch], None, None]:
        for step in range(start, stop):
            began = time.perf_counter()
            batches = self.step(step)
            if step + 1 < stop:
                self._request_ahead(step)
            self.waited_s += time.perf_counter() - began
            yield batches

    def step(self, step: int) -> Sequence[Batch]:
        data, prompts = self._rows.data, self._rows.prompts
        if data is not None and not learns_from_texts(self._config, step, seed=self._seed):
            return data.step(step)
        texts = self._texts(step)
        routes = None if prompts.routes is None else prompts.routes[[text.row for text in texts]]
        layout, collate = self._rows.layout, self._rows.collate
        batches = collate_step(columns_of(texts), layout, collate, routes=routes)
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

    def _texts(self, step: int) -> list[Rollout]:
        if not on_main(lambda: self._store.has(step)):
            request, self._ahead = self._ahead, None
            if request is None or step not in request.steps:
                later = [s for s in rollout_block(step, self._config) if s >= step]
                request = self._request(later, version=step)
            self._generate(request)
        texts = on_main(lambda: self._store.read(step))
        self._sums.update(
            texts=len(texts),
            tokens=sum(len(text.completion.ids) for text in texts),
            finished=sum(text.completion.finished for text in texts),
            staleness=sum(step - text.version for text in texts),
        )
        return texts

    def _request_ahead(self, step: int) -> None:
        # A remote generator makes the next texts while the student learns.
        following = step + 1
        if not self._config.works_ahead or following < self._config.from_step:
            return
        block = rollout_block(following, self._config)
        if block[0] == following and not on_main(lambda: self._store.has(following)):
            self._ahead = self._request(block, version=step)

    def _request(self, steps: Sequence[int], *, version: int) -> _Request:
        wanted = [
            (at, int(row))
            for at in steps
            if learns_from_texts(self._config, at, seed=self._seed)
            for row in self._rows.continued(at)
        ]
        generator, shape = self._generator, self._rows.layout.shape
        mine = wanted[shape.rank :: shape.world]
        prompts = [self._rows.prompts.prompt(row) for _, row in mine]
        seeds = [text_seed(self._seed, step, row) for step, row in mine]
        asked = (prompts, seeds, self._config.how)
        texts = partial(generator.generate, *asked)
        if isinstance(generator, RemoteGenerator) and wanted:
            with doing(f"sending the weights of step {version} to the servers"):
                generator.update(version)
            texts = generator.begin(*asked)

        def made() -> list[tuple[int, Rollout]]:
            return [
                (step, Rollout(row, prompt, completion, version, seed))
                for (step, row), prompt, completion, seed in zip(
                    mine, prompts, texts(), seeds, strict=True
                )
            ]

        return _Request(steps, len(wanted), made)

    def _generate(self, request: _Request) -> None:
        began = time.perf_counter()
        with doing(f"generating {request.total} texts at step {request.steps[0]}"):
            mine = request.made()
        self._sums["microseconds"] += round(1e6 * (time.perf_counter() - began))
        parts, world = gather(mine), self._rows.layout.shape.world
        made = [parts[number % world][number // world] for number in range(request.total)]
        on_main(lambda: self._write(request.steps, made))

    def _write(self, steps: Sequence[int], made: Sequence[tuple[int, Rollout]]) -> None:
        # Backwards: if the first step has its texts, the later steps have theirs too, and no texts
        # of one block are generated by two versions of the student.
        for step in reversed(steps):
            if not self._store.has(step):
                self._store.write(step, [rollout for at, rollout in made if at == step])
        self._store.remove_before(self._oldest())


def learns_from_texts(config: RolloutConfig, step: int, *, seed: int) -> bool:
    """Return whether a step learns from texts, the same on all ranks."""
    draw = np.random.default_rng([seed, _DRAW, step]).random()
    return step >= config.from_step and draw < config.mix


def text_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of the text that continues a row's prompt at a step; below 2 ** 63."""
    key = f"{seed}:{step}:{row}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
