"""Generation at ZeRO 3: weights gathered once per call, against weights gathered for every token.

`python benchmarks speed.generation [--ranks 2] [--pairs 8]`, on CPU ranks.

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
from collections.abc import Sequence

import torch
from torch import nn

from lib.clocks import Clocks, by_turns, line, over_ranks, timed
from lib.data import llama, sizes_of
from lib.launching import ROOT, start_benchmark
from lib.options import parsed, parser_of
from lib.tables import print_rows, ratio_of, spread_of
from megakd.config.models import ScratchModel
from megakd.config.task import TaskConfig
from megakd.contract.completions import Completion, Sampling, TextTokens
from megakd.engine import distributed
from megakd.engine.collectives import gather
from megakd.engine.initialize import Engine, frozen_engine
from megakd.engine.memory import keep_freed_memory
from megakd.engine.whole_model import whole_model
from megakd.models.generation import complete
from megakd.models.loading import load_model, resolve_model

TARGET = 0.35
PRESET = ROOT / "ds_configs" / "zero3.json"


class Case:
    """An engine and its prompts; both kinds of calls."""

    def __init__(self, given: argparse.Namespace, rank: int) -> None:
        self.engine, rng = engine_of(given), random.Random(rank)
        lengths = [rng.randint(4, given.prompt) for _ in range(given.rows)]
        self.prompts = [rng.choices(range(given.vocabulary), k=length) for length in lengths]
        self.sampling = Sampling(given.tokens)
        self.texts = list[list[Completion]]()

    def once(self) -> None:
        """Gather the weights, generate, and free the weights."""
        with whole_model(self.engine.module) as whole:
            self._complete(whole)

    def sharded(self) -> None:
        """Generate with the hooks of the engine."""
        self._complete(self.engine.module)

    def _complete(self, model: nn.Module) -> None:
        tokens, count = TextTokens(frozenset()), len(self.prompts)
        self.texts.append(
            complete(
                model, self.prompts, range(count), self.sampling, tokens=tokens, rows_at_once=count
            )
        )


def engine_of(given: argparse.Namespace) -> Engine:
    """Build a Llama from scratch in an inference engine at ZeRO 3."""
    layers, width = sizes_of(given.model)
    keys = {"tie_word_embeddings": True, "initializer_range": 0.1, "vocab_size": given.vocabulary}
    shape = llama(layers, width, max(1, width // 64), 3 * width, **keys)
    task = TaskConfig(type="causal_lm", dataset="none", max_length=64)
    ds = json.loads(PRESET.read_text(encoding="utf-8"))
    model = load_model(
        resolve_model(ScratchModel(config=shape), task, where="student.model"),
        task=task,
        label_names=(),
        tokenizer_size=given.vocabulary,
        ds=ds,
        dtype=torch.float32,
        seed=0,
        need_head=False,
    )
    return frozen_engine(model, ds=ds, dtype="fp32", rows=given.rows)


def measure(case: Case, given: argparse.Namespace) -> list[list[Clocks]]:
    sides = [lambda _, call=call: timed(call) for call in (case.once, case.sharded)]
    pairs = by_turns(sides, given.pairs, warm_up=given.warm_up)
    if case.texts[::2] != case.texts[1::2]:
        raise AssertionError("the two kinds of calls have generated different tokens")
    return pairs


def run_rank(given: argparse.Namespace) -> None:
    ranks = distributed.start()
    keep_freed_memory()
    case = Case(given, ranks.rank)
    size = sum(parameter.ds_numel for parameter in case.engine.module.parameters())
    pairs = over_ranks(gather(measure(case, given)))
    if ranks.is_main:
        show(pairs, size, given)
    distributed.stop()


def show(pairs: Sequence[Sequence[Clocks]], size: int, given: argparse.Namespace) -> None:
    medians, numbers, spreads = [], [], []
    for clock in Clocks._fields:
        both = [[getattr(side, clock) for side in pair] for pair in pairs]
        ratio, (once, sharded) = ratio_of(both), map(list, zip(*both, strict=True))
        print(f"{clock}: {line(ratio)}")
        medians.append(ratio.median)
        seconds = f"{spread_of(once).median:.2f} against {spread_of(sharded).median:.2f} s"
        numbers.append(f"{clock} {ratio.median:.3f} ({seconds})")
        spreads.append(f"{clock} {ratio.between()}")
    print(f"target {TARGET}: {'met' if max(medians) <= TARGET else 'missed'}")
    what = f"gathered once against sharded, {size / 1e6:.1f}M, {given.ranks} ranks"
    what += f", {given.rows} x {given.tokens} tokens each, {len(pairs)} pairs"
    print_rows(given.command, (what, ", ".join(numbers), f"95 %: {', '.join(spreads)}"))


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=1, help="pairs that do not count")
    parser.add_argument("--model", default="8x512", help="layers x width")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=8, help="prompts of each rank")
    parser.add_argument("--prompt", type=int, default=16, help="longest prompt in tokens")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of each prompt")
    parser.add_argument("--is-rank", action="store_true", help=argparse.SUPPRESS)
    given = parsed(parser, __name__, [word for word in arguments if word != "--is-rank"])
    given.is_rank = "--is-rank" in arguments
    if given.is_rank:
        run_rank(given)
    else:
        start_benchmark(__name__, [*arguments, "--is-rank"], given.ranks)
    return 0
