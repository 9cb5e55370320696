"""Generation whose ended rows leave the batch, against two other batches with the same texts.

`python benchmarks speed.generation_rows [--model 8x256] [--pairs 5]`, one process on the CPU.

Prompts of 8 to 200 tokens are continued together by at most 256 tokens; a few tokens of the
vocabulary end a text, so that the rows end at different times. The kinds of calls alternate:

* leave: `complete`, as the local generator calls it.
* stay: the same, but rows that have ended stay in the batch until the last row has ended, as in one
  call of transformers' `generate`.
* paged: transformers' `generate_batch` (continuous batching). Its public arguments take no noise of
  a row's own, so that only the most likely tokens can be compared.

All kinds have to generate the same texts. Times are CPU time, which other programs on the machine
hardly change if there is one thread.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from lib.clocks import by_turns, timed
from lib.data import llama, sizes_of
from lib.options import parsed, parser_of
from lib.tables import print_rows, ratio_of
from megakd.contract.completions import Sampling, TextTokens
from megakd.models import continuation
from megakd.models.generation import complete

PAGE = 32

Texts = list[tuple[int, ...]]


class Case:
    """A model, prompts, and the kinds of calls."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.model, rng = model_of(given), random.Random(given.seed)
        vocabulary = range(3, self.model.config.vocab_size)
        lengths = [rng.randint(8, given.prompt) for _ in range(given.rows)]
        self.prompts = [rng.choices(vocabulary, k=length) for length in lengths]
        self.ends = frozenset(rng.sample(vocabulary, given.ends))
        self.limit = given.tokens

    def leave(self, temperature: float) -> Texts:
        """Continue the prompts as the local generator does."""
        completions = complete(
            self.model,
            self.prompts,
            range(len(self.prompts)),
            Sampling(self.limit, temperature),
            tokens=TextTokens(self.ends),
            rows_at_once=len(self.prompts),
        )
        return [completion.ids for completion in completions]

    def stay(self, temperature: float) -> Texts:
        """Continue the prompts until the last row has ended."""
        share, continuation.SHARE_TO_LEAVE = continuation.SHARE_TO_LEAVE, math.inf
        try:
            return self.leave(temperature)
        finally:
            continuation.SHARE_TO_LEAVE = share

    def paged(self, temperature: float) -> Texts:
        """Continue the prompts with the most likely tokens by continuous batching."""
        del temperature
        config = GenerationConfig(
            max_new_tokens=self.limit, do_sample=False, eos_token_id=sorted(self.ends)
        )
        longest, rows = max(map(len, self.prompts)) + self.limit, len(self.prompts)
        # Without the number of blocks, the cache takes 60 % of the machine's memory.
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=rows * (math.ceil(longest / PAGE) + 1),
            max_batch_tokens=8192,
            max_requests_per_batch=rows,
            allow_block_sharing=False,
        )
        made = self.model.generate_batch(
            self.prompts, generation_config=config, continuous_batching_config=batching
        )
        return [tuple(one.generated_tokens) for one in made.values()]


def model_of(given: argparse.Namespace) -> Any:
    """Return the Llama in a folder, or one from scratch with the given layers x width."""
    if Path(given.model).is_dir():
        return AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    layers, width = sizes_of(given.model)
    torch.manual_seed(given.seed)
    keys = {"tie_word_embeddings": True, "initializer_range": 0.1, "vocab_size": given.vocabulary}
    shape = llama(layers, width, max(1, width // 32), 3 * width, **keys)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def measure(case: Case, given: argparse.Namespace, kinds: list[str], temperature: float) -> None:
    texts: dict[str, Texts] = {}

    def seconds(kind: str, _: int) -> float:
        found = list[Texts]()
        taken = timed(lambda: found.append(getattr(case, kind)(temperature))).cpu
        if texts.setdefault("first", found[0]) != found[0]:
            raise AssertionError("the kinds of calls have generated different texts")
        return taken

    rounds = by_turns([partial(seconds, kind) for kind in kinds], given.pairs, warm_up=1)
    lengths = [len(text) for text in texts["first"]]
    size = f"{sum(lengths)} tokens of {len(lengths)} x {max(lengths)}"
    leave, *others = zip(*rounds, strict=True)
    for kind, other in zip(kinds[1:], others, strict=True):
        ratio = ratio_of(list(zip(leave, other, strict=True)))
        middle = f"{statistics.median(leave):.2f} against {statistics.median(other):.2f} s"
        what = f"leave / {kind}, temperature {temperature:g}, {size}, prompts of 8 to "
        what += f"{given.prompt} tokens, {len(leave)} pairs"
        numbers = f"CPU time {ratio.median:.3f} ({middle})"
        print_rows(given.command, (what, numbers, f"95 %: {ratio.between()}"))


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--model", default="8x256", help="layers x width, or a folder")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=200, help="longest prompt in tokens")
    parser.add_argument("--tokens", type=int, default=256, help="maximum number of new tokens")
    parser.add_argument("--ends", type=int, default=60, help="number of tokens that end a text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    given = parsed(parser, __name__, arguments)
    torch.set_num_threads(given.threads)
    case = Case(given)
    measure(case, given, ["leave", "stay", "paged"], 0.0)
    measure(case, given, ["leave", "stay"], 1.0)
    return 0
