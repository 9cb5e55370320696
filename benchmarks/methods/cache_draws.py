"""A teacher's cache of random draws against a cache of its most likely tokens, and no cache.

`python benchmarks methods.cache_draws --data FOLDER [--seeds 1,2,3]`, on the CPU, one rank.

The teacher is a Llama of 260,000 weights, pretrained on TinyStories by the author of llama2.c; the
student is three of its layers. All variants learn from soft targets alone, at the same rate, for as
many steps on the same stories: from the teacher itself (`full`), from its 64, 13 or 8 most likely
tokens with a bucket for the other tokens (`top_64`, …), and from 16 draws (`draws_16`), which are
other draws for every seed and take about as many bytes as `top_13`. The score is the mean
KL(teacher || student) per token of held-out stories, over the whole vocabulary. Each run has a
folder below `--out`, is gone on with where it was, and is done once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lib.data import train_section, write_jsonl
from lib.launching import Leg, RunFailedError, launched, run_side_by_side, write_config
from lib.options import add_runs, need, parsed, parser_of
from lib.stories import MODEL, PARTS, STORIES, stories_teacher, tokenizer, write_stories_tokenizer
from lib.tables import mean_text, print_scores, table_of

HELD_OUT, LENGTH = 60, 128
CACHES = {
    "top_64": "cache_top_k=64",
    "top_13": "cache_top_k=13",
    "top_8": "cache_top_k=8",
    "draws_16": "cache_draws=16",
}
VARIANTS = ("full", *CACHES)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    need(given.data / part for part in PARTS)
    prepare(given)
    write_caches(given)
    legs = {name: [leg(given, name, seed) for seed in given.seeds] for name in VARIANTS}
    run_side_by_side([own for some in legs.values() for own in some], jobs=given.jobs)
    scores = {name: [score(given, own) for own in some] for name, some in legs.items()}
    first = given.seeds[0]
    sizes = {name: bytes_per_token(cache_folder(given, name, first)) for name in CACHES}
    show(scores, sizes, given.command)
    return 0


def prepare(given: argparse.Namespace) -> None:
    """Write the tokenizer, the stories in two splits, and the config that the variants change."""
    write_stories_tokenizer(given.data, given.out)
    stories = json.loads((given.data / STORIES).read_text(encoding="utf-8"))
    splits = {"validation": stories[:HELD_OUT], "train": stories[HELD_OUT:][: given.stories]}
    for split, texts in splits.items():
        rows = ({"text": text} for text in texts)
        write_jsonl(given.out / "stories" / f"{split}.jsonl", rows)
    write_config(given.out / "run.yaml", config(given))


def config(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(given.out / "run"),
        "task": {
            "type": "causal_lm",
            "dataset": str(given.out / "stories"),
            "max_length": LENGTH,
            "tokenizer": str(tokenizer(given.out)),
        },
        "teacher": stories_teacher(given.data),
        "student": {"model": "from_teacher", "layers": 3, "deepspeed": "zero0"},
        "method": {"name": "single"},
        "objective": [{"loss": "soft_target_kl"}],
        "train": train_section(8, given.steps, 3e-3),
    }


def leg(given: argparse.Namespace, name: str, seed: int) -> Leg:
    """Return one run; `full` has no cache."""
    overrides = [f"seed={seed}"]
    if name in CACHES:
        draws = [f"teacher.cache_seed={seed}"] if "draws" in name else []
        overrides += [f"teacher.cache={cache_folder(given, name, seed)}"]
        overrides += [f"teacher.{CACHES[name]}", *draws]
    return Leg(name, given.out / "run.yaml", given.out / f"{name}-{seed}", tuple(overrides))


def cache_folder(given: argparse.Namespace, name: str, seed: int) -> Path:
    """Return the folder of a cache; the most likely tokens are the same for every seed."""
    return given.out / "caches" / (f"{name}-{seed}" if "draws" in name else name)


def write_caches(given: argparse.Namespace) -> None:
    legs = {cache_folder(given, n, s): leg(given, n, s) for n in CACHES for s in given.seeds}
    for folder, own in legs.items():
        output = f"output_dir={given.out / 'cache_run'}"
        code = launched("cache_teacher", own.config, 1, [*own.overrides, output])
        if code != 0:
            raise RunFailedError(f"{folder}: exit code {code}")


def bytes_per_token(folder: Path) -> float:
    """Return the bytes of a cache on disk, all files included, per position of its rows."""
    rows = json.loads((folder / "cache.json").read_text(encoding="utf-8"))["rows"]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return size / (rows * LENGTH)


def score(given: argparse.Namespace, own: Leg) -> float:
    """Return the held-out divergence of the student of a finished run, in nats per token."""
    with (given.out / "stories" / "validation.jsonl").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return divergence(given.data / MODEL / "hf", own.output / "final", tokenizer(given.out), texts)


@torch.no_grad()
def divergence(teacher: Path, student: Path, tokenizer: Path, texts: Sequence[str]) -> float:
    """Return the mean KL(teacher || student) over all positions of texts, in nats."""
    encode = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    models = [LlamaForCausalLM.from_pretrained(path).eval() for path in (teacher, student)]
    total, count = 0.0, 0
    for text in texts:
        ids = encode(text, return_tensors="pt")["input_ids"][:, :LENGTH]
        theirs, ours = (model(input_ids=ids).logits.double().log_softmax(-1) for model in models)
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += ids.numel()
    return total / count


def show(scores: Mapping[str, Sequence[float]], sizes: Mapping[str, float], command: str) -> None:
    lines = {
        name: {"KL": mean_text(values, 4)}
        | ({"bytes per token": f"{sizes[name]:.1f}"} if name in sizes else {})
        for name, values in scores.items()
    }
    print(table_of("variant", lines))
    extra = ["bytes per token: " + ", ".join(f"{n} {size:.1f}" for n, size in sizes.items())]
    what = "held-out KL(teacher || student) in nats per token"
    print_scores(what, command, scores, extra=extra)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "cache_draws", data="lm/ and weights/")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stories", type=int, default=300, help="stories to learn from")
    return parsed(parser, __name__, arguments)
