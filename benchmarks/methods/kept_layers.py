"""The loss of a decoder before any training, with some of its layers: which rule keeps more?

`python benchmarks methods.kept_layers --run FOLDER --data FILE [--rows 4] [--keep 20,15,10]`

FOLDER is a run of megakd that has measured `stages/layers`, and `--model` the teacher of that run.
The layers are left out of the whole model, which computes what the model of the others does. The
loss is over the answers of the last rows of FILE, conversations as jsonl, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.options import integers, parsed, parser_of
from lib.tables import print_rows
from megakd.contract.views import evenly_spaced, most_important
from megakd.models.layers import left_out


def of_old(layers: int, keep: int) -> tuple[int, ...]:
    """Return round(i * L / N) for i from 1, the rule of version 0.11."""
    return tuple(round(place * layers / keep) for place in range(1, keep + 1))


def answers(given: argparse.Namespace) -> list[tuple[Tensor, int]]:
    """Return the tokens of every row, and the number of its tokens before the answer."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    lines = given.data.read_text(encoding="utf-8").splitlines()[-given.rows :]
    rows = []
    for line in lines:
        messages = json.loads(line)["messages"]
        whole, asked = (
            tokenizer.apply_chat_template(some, tokenize=True, return_dict=False)
            for some in (messages, messages[:-1])
        )
        rows.append((torch.tensor([whole]), len(asked)))
    return rows


@torch.inference_mode()
def loss(model: torch.nn.Module, rows: Sequence[tuple[Tensor, int]], kept: Sequence[int]) -> float:
    total, count = 0.0, 0
    layers = range(1, model.config.num_hidden_layers + 1)  # type: ignore[union-attr]
    with ExitStack() as stack:
        for layer in {*layers} - {*kept}:
            stack.enter_context(left_out(model, layer))
        for ids, first in rows:
            logits = model(ids, use_cache=False).logits[0, first - 1 : -1]
            total += float(F.cross_entropy(logits, ids[0, first:], reduction="sum"))
            count += len(logits)
    return total / count


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    metrics = json.loads((given.run / "stages" / "layers" / "result.json").read_text())["metrics"]
    layers, rows = len(metrics), answers(given)
    scores = [metrics[f"layer_{number}"] for number in range(1, layers + 1)]
    whole = loss(model, rows, range(1, layers + 1))
    guess, table = math.log(model.config.vocab_size), []
    print(f"all {layers}: {whole:.2f}; guessing: {guess:.2f}", flush=True)
    for keep in given.keep:
        rules = (of_old(layers, keep), evenly_spaced(layers, keep), most_important(scores, keep))
        losses = [loss(model, rows, kept) for kept in rules]
        numbers = "round(i L / N) {:.2f}, spacing {:.2f}, importance {:.2f}".format(*losses)
        print(f"{keep} layers: {numbers} ({', '.join(map(str, rules[-1]))})", flush=True)
        table.append((f"loss of {keep} of {layers} layers", numbers, "-"))
    print_rows(given.command, *table)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--keep", type=integers, default=[20, 15, 10])
    return parsed(parser, __name__, arguments)
