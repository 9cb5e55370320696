"""Off-policy, on-policy and mixed distillation of a small decoder at equal steps.

`python benchmarks methods.on_policy [--seeds 1,2,3] [--quick]`, on the CPU, one rank, without any
data.

The task is arithmetic in steps: `7+5+9+4=` is continued by `12,21,25`, so that an early mistake
spoils the rest. The teacher (1.3 million weights) is trained until it has the skill; each student
(0.2 million weights) is trained on the data half-way. From there the student learns for as many
steps from the labels (`labels`), from the teacher on the data (`off_policy`), from the teacher on
its own texts (`on_policy`), or half of each in every step (`mixed`). Greedy texts for held-out
prompts are right if they equal the data's. Every run has a folder below `--out`, is gone on with
where it was, and is done once.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.data import llama, train_section, write_jsonl
from lib.launching import records_of, trained, write_config
from lib.options import add_runs, parsed, parser_of
from lib.tables import Columns, print_models

TERMS, END = 8, "<end>"
KL = ({"loss": "soft_target_kl", "weight": 0.5}, {"loss": "soft_target_reverse_kl", "weight": 0.5})
ARMS: Mapping[str, Mapping[str, Any]] = {
    "labels": {"method": {"name": "finetune"}},
    "off_policy": {"method": {"name": "single"}, "objective": list(KL)},
    "on_policy": {"method": {"name": "single"}, "objective": list(KL), "mix": {"rollout": 1.0}},
    "mixed": {
        "method": {"name": "single"},
        "objective": list(KL),
        "mix": {"rollout": 0.5, "data": 0.5},
    },
}
METRICS = {
    "right": "eval/match",
    "KL on data": "eval/soft_target_kl",
    "KL on own texts": "eval/text_soft_target_kl",
    "loss": "eval/loss",
}


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    write_data(given.out / "data")
    teacher = last_evaluation(run(given, "teacher", 0, teacher_config(given)), "student")
    models: dict[str, Columns] = {name: {} for name in ("half-way", *ARMS)}
    for seed in given.seeds:
        start = run(given, f"half-way-{seed}", seed, half_way(given))
        folders = {"half-way": start}
        for name in ARMS:
            folders[name] = run(given, f"{name}-{seed}", seed, arm(given, name, start / "final"))
        for name, folder in folders.items():
            metrics = last_evaluation(folder, "student")
            for title, key in METRICS.items():
                if key in metrics:
                    models[name].setdefault(title, {})[seed] = metrics[key]
    print(f"teacher: right {teacher['eval/match']:.3f}, loss {teacher['eval/loss']:.4f}")
    print_models("arithmetic in steps", given.command, models, reference="off_policy")
    return 0


def write_data(folder: Path) -> None:
    """Sums in steps as rows with prompt and completion, and a tokenizer of characters."""
    rows = list(sums(20_300, random.Random(0)))
    for split, part in (("validation", rows[:300]), ("train", rows[300:])):
        write_jsonl(folder / f"{split}.jsonl", part)
    vocabulary = {token: number for number, token in enumerate((END, *"0123456789+=,"))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(folder / "tokenizer")


def sums(count: int, rng: random.Random) -> Iterator[dict[str, str]]:
    seen = set[tuple[int, ...]]()
    while len(seen) < count:
        digits = tuple(rng.choices(range(1, 10), k=TERMS))
        if digits in seen:
            continue
        seen.add(digits)
        steps = [sum(digits[: number + 1]) for number in range(1, TERMS)]
        yield {"prompt": "+".join(map(str, digits)) + "=", "completion": ",".join(map(str, steps))}


def common(given: argparse.Namespace, steps: int, rate: float) -> dict[str, Any]:
    data = given.out / "data"
    return {
        "task": {
            "type": "causal_lm",
            "train_files": str(data / "train.jsonl"),
            "validation_files": str(data / "validation.jsonl"),
            "tokenizer": str(data / "tokenizer"),
            "max_length": 48,
        },
        "train": train_section(64, steps, rate, warmup_ratio=0.03),
        "eval": {
            "per_device_eval_batch_size": 100,
            "generation": {"max_new_tokens": 24, "rows": 300, "match": "exact"},
        },
        "log": {"logging_steps": 50, "report_to": []},
        "save": {"save_steps": 500},
    }


def teacher_config(given: argparse.Namespace) -> dict[str, Any]:
    """The training of the teacher on the data; its evaluations show whether it has converged."""
    steps = 20 if given.quick else 1500
    shared = common(given, steps, 2e-3)
    return {
        **shared,
        "eval": {**shared["eval"], "eval_steps": steps // 10},
        "student": {"model": {"config": llama(3, 176, 4, 528)}, "deepspeed": "zero0"},
        "method": {"name": "finetune"},
    }


def half_way(given: argparse.Namespace) -> dict[str, Any]:
    steps = 10 if given.quick else given.start_steps
    return {
        **common(given, steps, 2e-3),
        "student": {"model": {"config": llama(2, 88, 4, 264)}, "deepspeed": "zero0"},
        "method": {"name": "finetune"},
    }


def arm(given: argparse.Namespace, name: str, start: Path) -> dict[str, Any]:
    steps = 5 if given.quick else given.steps
    config = {**common(given, steps, 5e-4), "student": {"model": str(start), "deepspeed": "zero0"}}
    chosen = dict(ARMS[name])
    mix = chosen.pop("mix", None)
    if mix is not None:
        config["rollout"] = {"max_new_tokens": 24, "mix": mix, "mix_per": "row"}
    if "objective" in chosen:
        model = str(given.out / "teacher" / "final")
        config["teacher"] = {"model": model, "deepspeed": "teacher_zero0"}
        config["eval"]["losses"] = True
    return {**config, **chosen}


def run(given: argparse.Namespace, name: str, seed: int, config: Mapping[str, Any]) -> Path:
    folder = given.out / name
    path = write_config(given.out / f"{name}.yaml", {"output_dir": str(folder), **config})
    trained(path, folder, ranks=1, overrides=[f"seed={seed}"])
    return folder


def last_evaluation(folder: Path, stage: str) -> dict[str, float]:
    records = reversed(records_of(folder))
    return next(r for r in records if r["stage"] == stage and "eval/match" in r)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "on_policy", jobs=None)
    parser.add_argument("--steps", type=int, default=300, help="of the second training")
    parser.add_argument("--start_steps", type=int, default=400, help="of the first training")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    return parsed(parser, __name__, arguments)
