"""Speed-up of a forward of a cut model, against the whole model.

`python benchmarks speed.latency [--shape 6x384] [--grid 0.5,0.9] [--lengths 24,128]`, one thread.

A BERT of MiniLM's shape with random weights and scores, so that layers keep different numbers of
heads and neurons, is timed by turns with what is left of it at every sparsity. `--ratios` rounds
of that give a ratio each.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from lib.data import sizes_of
from lib.options import fractions, integers, parsed, parser_of
from lib.tables import print_rows, spread_of
from megakd.models.architectures import architecture_of
from megakd.models.cutting import cut_class_name, cut_config
from megakd.models.own_models import own_class
from megakd.pruning.allocation import UnitScores, view_at
from megakd.reports.latency import Work, measure_latencies

WHOLE = "whole"


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    torch.set_num_threads(1)
    models = cut_models(given)
    rows = []
    for length in given.lengths:
        ratios = rounds(models, given, length)
        for (name, batch), values in ratios.items():
            spread = spread_of(values)
            numbers, between = f"{spread.median:.1f} times faster", f"95 %: {spread.between(1)}"
            what = f"forward of {given.shape} at {name}, batch {batch}, {length} tokens"
            print(f"{what}: {numbers} ({between})", flush=True)
            rows.append((what, numbers, between))
    print_rows(given.command, *rows)
    return 0


def cut_models(given: argparse.Namespace) -> dict[str, PreTrainedModel]:
    layers, width = sizes_of(given.shape)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = BertConfig(**sizes, num_attention_heads=12)
    drawn = random.Random(0)
    units = architecture_of(config).units(config)
    heads, neurons = (
        tuple(tuple(drawn.random() for _ in range(count)) for count in counts)
        for counts in (units.heads, units.neurons)
    )
    scores = UnitScores(heads, neurons)
    whole = BertForSequenceClassification(config)
    models: dict[str, PreTrainedModel] = {WHOLE: whole}
    for sparsity in given.grid:
        smaller = cut_config(config, view_at(scores, sparsity, head_width=width // 12))
        name = cut_class_name(whole, smaller)
        models[f"sparsity {sparsity:g}"] = (own_class(name) or type(whole))(smaller)
    return models


def rounds(
    models: Mapping[str, PreTrainedModel], given: argparse.Namespace, length: int
) -> dict[tuple[str, int], list[float]]:
    ratios: dict[tuple[str, int], list[float]] = {}
    for _ in range(given.ratios):
        measured = measure_latencies(models, Work(given.batches, length))
        whole = {one["batch"]: one["ms"] for one in measured if one["model"] == WHOLE}
        for one in measured:
            if one["model"] != WHOLE:
                ratio = whole[one["batch"]] / one["ms"]
                ratios.setdefault((one["model"], one["batch"]), []).append(ratio)
    return ratios


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--shape", default="6x384", help="layers x width, 12 heads")
    parser.add_argument("--grid", type=fractions, default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("--batches", type=integers, default=[1, 32])
    parser.add_argument("--lengths", type=integers, default=[24, 128])
    parser.add_argument("--ratios", type=int, default=5)
    return parsed(parser, __name__, arguments)
