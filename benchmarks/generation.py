"""Generation at ZeRO 3: weights gathered once per call, against weights gathered for every token.

`python benchmarks/generation.py [--ranks 2] [--pairs 8]`, on CPU ranks.

A pair is one call of each kind with the same prompts and seeds, in one process and in alternating
order; both have to generate the same tokens:

* once: `whole_model` gathers a copy, and the ranks generate with the copy without collectives.
* sharded: transformers' `generate` calls the module of the engine, whose hooks gather the weights
  of every layer for every token. No completion ends early, so that all ranks take equally many
  steps, and the ranks do not have to agree on the end.

CPU time is that of all threads and ranks together, wall-clock that of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from launching import ROOT, start_ranks
from machine import markdown_row, print_row, spread_of
from overhead import Clocks, interval, line, timed

from megakd.config.models import ScratchModel
from megakd.config.task import TaskConfig
from megakd.contract.rollouts import Sampling, TextTokens
from megakd.engine import distributed
from megakd.engine.collectives import gather
from megakd.engine.initialize import frozen_engine
from megakd.engine.memory import keep_freed_memory
from megakd.engine.whole_model import whole_model
from megakd.models.generation import complete
from megakd.models.loading import load_model, resolve_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from megakd.contract.rollouts import Completion
    from megakd.engine.initialize import Engine

TARGET = 0.35
PRESET = ROOT / "ds_configs" / "zero3.json"


class Pair(NamedTuple):
    """One call of each kind."""

    once: Clocks
    sharded: Clocks


class Case:
    """An engine and its prompts; both kinds of calls."""

    def __init__(self, given: argparse.Namespace, ranks: distributed.Ranks) -> None:
        self.engine = engine_of(given)
        rng = random.Random(ranks.rank)
        lengths = [rng.randint(4, given.prompt) for _ in range(given.rows)]
        self.prompts = [rng.choices(range(given.vocabulary), k=length) for length in lengths]
        self.sampling = Sampling(given.tokens)
        self.said: list[Completion] = []

    def once(self) -> None:
        """Gather the weights, generate, and free the weights."""
        with whole_model(self.engine.module) as whole:
            self._complete(whole)

    def sharded(self) -> None:
        """Generate with the hooks of the engine."""
        self._complete(self.engine.module)

    def _complete(self, model: nn.Module) -> None:
        self.said = complete(
            model,
            self.prompts,
            range(len(self.prompts)),
            self.sampling,
            tokens=TextTokens(frozenset()),
            rows_at_once=len(self.prompts),
        )


def engine_of(given: argparse.Namespace) -> Engine:
    """A Llama from scratch in an inference engine at ZeRO 3."""
    layers, width = (int(number) for number in given.model.split("x"))
    keys = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    keys |= {"num_attention_heads": max(1, width // 64), "vocab_size": given.vocabulary}
    keys |= {"model_type": "llama", "tie_word_embeddings": True, "initializer_range": 0.1}
    task = TaskConfig(type="causal_lm", dataset="none", max_length=64)
    model = load_model(
        resolve_model(ScratchModel(config=keys), task, where="student.model"),
        task=task,
        label_names=(),
        tokenizer_size=given.vocabulary,
        ds=(ds := json.loads(PRESET.read_text(encoding="utf-8"))),
        dtype=torch.float32,
        seed=0,
        need_head=False,
    )
    return frozen_engine(model, ds=ds, dtype="fp32", rows=given.rows)


def measure(case: Case, given: argparse.Namespace) -> list[Pair]:
    """Time pairs of calls in alternating order."""
    pairs = []
    for number in range(given.warm_up + given.pairs):
        if number % 2 == 0:
            (once, said), (sharded, other) = answer(case, case.once), answer(case, case.sharded)
        else:
            (sharded, other), (once, said) = answer(case, case.sharded), answer(case, case.once)
        if said != other:
            raise AssertionError("the two kinds of calls have generated different tokens")
        pairs.append(Pair(once, sharded))
    return pairs[given.warm_up :]


def answer(case: Case, call: Callable[[], None]) -> tuple[Clocks, list[Completion]]:
    """The clocks of a call, and its completions."""
    clocks = timed(call)
    return clocks, case.said


def run_rank(given: argparse.Namespace) -> None:
    """One rank's part."""
    ranks = distributed.start()
    keep_freed_memory()
    case = Case(given, ranks)
    size = sum(parameter.ds_numel for parameter in case.engine.module.parameters())
    pairs = [over_ranks(same) for same in zip(*gather(measure(case, given)), strict=True)]
    if ranks.is_main:
        show(pairs, size, given)
    distributed.stop()


def over_ranks(same: Sequence[Pair]) -> Pair:
    """One pair of all ranks: CPU time together, wall-clock of the slowest."""

    def joined(clocks: Sequence[Clocks]) -> Clocks:
        return Clocks(sum(c.cpu for c in clocks), max(c.wall for c in clocks))

    return Pair(joined([pair.once for pair in same]), joined([pair.sharded for pair in same]))


def show(pairs: Sequence[Pair], size: int, given: argparse.Namespace) -> None:
    """The seconds of both kinds, their ratio, and the row for docs/measurements.md."""
    ratios, numbers, spreads = {}, [], []
    for clock in Clocks._fields:
        once = [getattr(pair.once, clock) for pair in pairs]
        sharded = [getattr(pair.sharded, clock) for pair in pairs]
        ratios[clock] = spread_of([a / b for a, b in zip(once, sharded, strict=True)])
        middle = spread_of(once).median, spread_of(sharded).median
        ends = f"{min(once):.2f} to {max(once):.2f} s, {min(sharded):.2f} to {max(sharded):.2f} s"
        print(f"{clock}: {line(ratios[clock])}; once, sharded: {ends}")
        seconds = f"{middle[0]:.2f} against {middle[1]:.2f} s"
        numbers.append(f"{clock} {ratios[clock].median:.3f} ({seconds})")
        spreads.append(f"{clock} {interval(ratios[clock])}")
    met = max(ratio.median for ratio in ratios.values()) <= TARGET
    print(f"target {TARGET}: {'met' if met else 'missed'}")
    what = f"gathered once against sharded, {size / 1e6:.1f}M, {given.ranks} ranks"
    what += f", {given.rows} x {given.tokens} tokens each, {len(pairs)} pairs"
    spread = f"95 %: {', '.join(spreads)}"
    print_row(markdown_row(what, given.command, ", ".join(numbers), spread))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; the model is layers x width."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=1, help="pairs that do not count")
    parser.add_argument("--model", default="8x512")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8, help="prompts of each rank")
    parser.add_argument("--prompt", type=int, default=16, help="longest prompt in tokens")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each prompt")
    parser.add_argument("--is-rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    shown = [argument for argument in arguments if argument != "--is-rank"]
    given.command = shlex.join(["python", "benchmarks/generation.py", *shown])
    return given


def main(arguments: Sequence[str]) -> int:
    """Starts the ranks, or is one of them."""
    given = parse(arguments)
    if given.is_rank:
        run_rank(given)
        return 0
    return start_ranks(Path(__file__), [*arguments, "--is-rank"], given.ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
