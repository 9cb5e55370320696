"""Sampling by the loop of megakd against `generate` of transformers: CPU time per token, in pairs.

`python benchmarks speed.sampling --model FOLDER --prompts FILE [--pairs 5] [--batches 8,32]`, one
thread, fp32. FILE is a jsonl whose rows have `question` or `prompt`.

Both sides of a pair continue the same prompts, by turns. `limit`: all rows sample the same number
of tokens; `ends`: rows end at a full stop, so that the loop goes on without them. The loop stays
while `generate` costs more than 1.15 of its time in one of the cases.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megakd.config.sections import Sampling
from megakd.models.end_tokens import TextTokens
from megakd.models.generation import complete

LAST_TOKENS, LIMIT, MOST = 40, 24, 64
Texts = list[list[int]]
Prompts = Sequence[Sequence[int]]


def by_loop(model: Any, prompts: Prompts, sampling: Sampling, ends: list[int], pad: int) -> Texts:
    texts = complete(
        model,
        prompts,
        range(len(prompts)),
        sampling,
        tokens=TextTokens(frozenset(ends), pad),
        rows_at_once=len(prompts),
    )
    return [[*text.ids] for text in texts]


def by_generate(
    model: Any, prompts: Prompts, sampling: Sampling, ends: list[int], pad: int
) -> Texts:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + [*p] for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    draws = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        draws |= {"temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, **draws
    )
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:]
    cut: Texts = []
    for row in out.tolist():
        end = next((n for n, token in enumerate(row) if token in ends), len(row) - 1)
        cut.append(row[: end + 1])
    return cut


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="speed.sampling", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batches", default="8,32")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = map(json.loads, options.prompts.read_text(encoding="utf-8").splitlines())
    texts = [row.get("question") or row["prompt"] for row in rows]
    prompts = [tokenizer(text)["input_ids"][-LAST_TOKENS:] for text in texts]
    stop = tokenizer(".", add_special_tokens=False)["input_ids"][0]
    pad = tokenizer.pad_token_id or 0
    cases = {
        "limit": (Sampling(LIMIT, 1.0), list[int]()),
        "ends": (Sampling(MOST, 0.0), [tokenizer.eos_token_id, stop]),
    }
    sides: dict[str, Callable[..., Texts]] = {"loop": by_loop, "generate": by_generate}
    for case, (sampling, ends) in cases.items():
        for batch in map(int, options.batches.split(",")):
            ratios = list[float]()
            for pair in range(options.pairs):
                start = pair * batch % max(1, len(prompts) - batch)
                per_token = dict[str, float]()
                for name in [*sides] if pair % 2 == 0 else [*sides][::-1]:
                    began = time.process_time()
                    texts = sides[name](model, prompts[start : start + batch], sampling, ends, pad)
                    per_token[name] = (time.process_time() - began) / sum(map(len, texts))
                ratios.append(per_token["generate"] / per_token["loop"])
                times = ", ".join(f"{n} {1e3 * s:.1f} ms" for n, s in per_token.items())
                print(f"{case}, batch {batch}, pair {pair}: {times} per token", flush=True)
            shown = " ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
            middle = statistics.median(ratios)
            print(f"{case}, batch {batch}: generate / loop {middle:.2f} ({shown})", flush=True)
    return 0
