"""Memory of a rank while a sharded model is loaded, and over its run, for 1, 2 and 4 ranks.

`python benchmarks memory.by_ranks [--ranks 1,2,4]`; some minutes a number of ranks, and up to 12 GB
below $TMPDIR. A Llama of a third of a billion weights, written to a folder in bf16, learns for
three steps in fp32 with AdamW, is evaluated, saved and written, at a ZeRO 3 that gathers a tenth of
it at a time, as with DeepSpeed's defaults for 10B weights. Printed are the peaks of the rank that
took the most beside those of `megakd plan`, process and all.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from lib.data import llama, write_jsonl
from lib.launching import write_config
from lib.options import integers, parsed, parser_of
from lib.tables import print_rows
from megakd.data.vocabularies import train_tokenizer
from memory.plan import Peaks, planned_and_measured, predicted_peaks

TOLERANCE = 0.15
LENGTH, ROWS = 64, 2
WORDS = [f"word{number}" for number in range(1000)]
SIZES = {"num_key_value_heads": 4, "max_position_embeddings": LENGTH, "vocab_size": 8000}
GATHERED = 30_000_000
ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_max_live_parameters": GATHERED,
        "stage3_max_reuse_distance": GATHERED,
        "stage3_prefetch_bucket_size": GATHERED // 3,
        "reduce_bucket_size": GATHERED,
    }
}


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory(prefix="megakd-ranks-") as name:
        folder = Path(name)
        write_texts(folder / "data")
        weights = write_model(folder / "model")
        for ranks in given.ranks:
            path = write_config(folder / f"{ranks}/run.yaml", run_tree(folder, ranks))
            plan, measured = planned_and_measured(path, ranks)
            base, shard = plan.host_base_bytes, 4 * weights / ranks
            print(
                f"{ranks} ranks: shard {shard / 1e9:.2f} GB, base {base / 1e9:.2f} GB, "
                f"loading {(measured.load - base) / shard:.2f} shards beside the base",
                flush=True,
            )
            pairs = zip(measured, predicted_peaks(plan), strict=True)
            for what, (peak, planned) in zip(Peaks._fields, pairs, strict=True):
                error = planned / peak - 1
                worst = max(worst, abs(error))
                numbers = f"measured {peak / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB"
                print(f"  {what}: {numbers}", flush=True)
                of_what = f"{what}, {weights / 1e9:.2f}B weights, {ranks} ranks"
                rows.append((of_what, numbers, f"{error:+.1%}"))
    print_rows(given.command, *rows)
    return 1 if worst > TOLERANCE else 0


def write_texts(folder: Path) -> None:
    drawn = random.Random(0)
    for split, count in (("train", 64), ("validation", 4 * ROWS)):
        texts = (" ".join(drawn.choices(WORDS, k=2 * LENGTH)) for _ in range(count))
        write_jsonl(folder / f"{split}.jsonl", ({"text": text} for text in texts))


def write_model(folder: Path) -> int:
    """Write a Llama with random weights and its tokenizer; return how many weights it has."""
    shape = llama(28, 1024, 16, 2816, **SIZES, tie_word_embeddings=False)
    model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    model.save_pretrained(folder)
    made = train_tokenizer(lambda: WORDS, kind="bpe", vocab_size=1200, for_encoder=False)
    made.save_pretrained(folder)
    return model.num_parameters()


def run_tree(folder: Path, ranks: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / f"{ranks}/run"),
        "task": {
            "type": "causal_lm",
            "dataset": str(folder / "data"),
            "max_length": LENGTH,
            "text_columns": ["text"],
        },
        "student": {"model": str(folder / "model"), "deepspeed": ZERO_3},
        "method": {"name": "finetune"},
        "train": {"per_device_train_batch_size": ROWS, "max_steps": 3, "learning_rate": 1e-5},
        "save": {"save_steps": 2},
        "eval": {"eval_steps": 3, "per_device_eval_batch_size": ROWS},
        "log": {"report_to": []},
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=integers, default=(1, 2, 4))
    return parsed(parser, __name__, arguments)
