"""Training batches from texts that a model generates, and the draw of each row's source."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from collections.abc import Generator as Iteration
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from megakd.config.rollout import RolloutConfig, RowSource, rollout_block
from megakd.contract.batch import Batch, BatchSource
from megakd.contract.completions import (
    TOKENS_PER_TEXT,
    TRUNCATED,
    Generator,
    RemoteGenerator,
    Rollout,
)
from megakd.data.collation import Collator
from megakd.data.loader import RowOrder
from megakd.data.step_layout import StepLayout, collate_step
from megakd.engine.activity import doing
from megakd.engine.collectives import gather, on_main
from megakd.rollouts.prompts import Prompts, columns_of_rows, rollout_row
from megakd.rollouts.store import RolloutStore

_DRAW = 1
"""Keeps the random numbers of the draw apart from others of the same seed and step."""


class StepRows(NamedTuple):
    """The data behind a stage's rollouts.

    continued, learned: the rows of each step where it continues prompts, and where it uses data.
    """

    prompts: Prompts
    continued: RowOrder
    learned: RowOrder
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
    """The batches of a stage whose rows are replaced by texts that a model generates.

    A row's source (`rollout` or `data`) is a function of (config, seed, step). `data` are rows with
    something to learn; the others continue rows with a prompt that leaves room for a text. Texts
    are written to disk before the student learns from them, and a resumed run reads them from disk.
    `oldest` returns the first step from which the run may be resumed.
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
        orders = {"rollouts": rows.continued, "data": rows.learned}
        self.steps_per_epoch = max(orders[source].steps_per_epoch for source in config.draws)
        self.waited_s = 0.0
        """Seconds that the loop has waited for batches, including the generation of texts."""
        self._statistics = RolloutStatistics()
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
        drawn = self._drawn(step)
        texts = iter(self._texts(step) if any(of == "rollout" for _, of in drawn) else ())
        prompts = self._rows.prompts
        rows = [prompts.row(row) if of == "data" else rollout_row(next(texts)) for row, of in drawn]
        routes = None if prompts.routes is None else prompts.routes[[row for row, _ in drawn]]
        layout, collate = self._rows.layout, self._rows.collate
        return collate_step(columns_of_rows(rows), layout, collate, routes=routes)

    def _drawn(self, step: int) -> list[tuple[int, str]]:
        # Row and source of each row of a step: as many as all of its sources have.
        shape = self._rows.layout.shape
        orders = {"rollout": self._rows.continued, "data": self._rows.learned}
        sources = row_sources(self._config, step, shape.rows_per_step, seed=self._seed).tolist()
        rows = {source: orders[source](step) for source in set(sources)}
        count = min(map(len, rows.values()))
        return [(int(rows[s][place]), s) for place, s in enumerate(sources[:count])]

    def scalars(self) -> dict[str, float]:
        scalars, self._statistics = self._statistics.scalars(), RolloutStatistics()
        return scalars

    def _texts(self, step: int) -> list[Rollout]:
        if not on_main(lambda: self._store.has(step)):
            request, self._ahead = self._ahead, None
            if request is None or step not in request.steps:
                later = [s for s in rollout_block(step, self._config) if s >= step]
                request = self._request(later, version=step)
            self._generate(request)
        texts = on_main(lambda: self._store.read(step))
        self._statistics.add(texts, step)
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
        wanted = [(at, row) for at in steps for row, of in self._drawn(at) if of == "rollout"]
        generator, shape = self._generator, self._rows.layout.shape
        mine = wanted[shape.rank :: shape.world]
        prompts = [self._rows.prompts.prompt(row) for _, row in mine]
        seeds = [text_seed(self._seed, step, row) for step, row in mine]
        asked = (prompts, seeds, self._config.sampling_at(steps[0]))
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
        self._statistics.seconds += time.perf_counter() - began
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


@dataclass
class RolloutStatistics:
    """Sums over the new texts since the last logged step; `seconds` of generation."""

    texts: int = 0
    tokens: int = 0
    finished: int = 0
    staleness: int = 0
    seconds: float = 0.0

    def add(self, rollouts: Sequence[Rollout], step: int) -> None:
        self.texts += len(rollouts)
        self.tokens += sum(len(rollout.completion.ids) for rollout in rollouts)
        self.finished += sum(rollout.completion.finished for rollout in rollouts)
        self.staleness += sum(step - rollout.version for rollout in rollouts)

    def scalars(self) -> dict[str, float]:
        if not self.texts:
            return {}
        return {
            TOKENS_PER_TEXT: self.tokens / self.texts,
            TRUNCATED: 1 - self.finished / self.texts,
            "rollout/staleness": self.staleness / self.texts,
            "rollout/seconds": self.seconds,
        }


def row_sources(config: RolloutConfig, step: int, rows: int, *, seed: int) -> NDArray[np.str_]:
    """Return the source of each row of a step, over all ranks: `rollout` or `data`."""
    if step < config.from_step:
        return np.full(rows, "data")
    sources, per_step = get_args(RowSource), config.mix_per == "step"
    shares = [config.mix.get(source, 0.0) for source in sources]
    generator = np.random.default_rng([seed, _DRAW, step])
    chosen = generator.choice(sources, size=1 if per_step else rows, p=shares)
    return np.repeat(chosen, rows) if per_step else chosen


def text_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of the text that continues a row's prompt at a step; below 2 ** 63."""
    key = f"{seed}:{step}:{row}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
