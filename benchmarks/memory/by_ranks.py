"""Memory of a rank while a sharded model is loaded, and over its run, for 1, 2 and 4 ranks.

`python benchmarks memory.by_ranks [--ranks 1,2,4] [--set key=value]`; some minutes a number of
ranks, and up to 12 GB. A Llama of a third of a billion weights, written to a folder in bf16,
learns for three steps in fp32 with AdamW, is evaluated, saved and written, at a ZeRO 3 that gathers
a tenth of it at a time, as with DeepSpeed's defaults for 10B weights. Printed are the peaks of the
rank that took the most beside those of `megakd plan`, process and all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib.launching import write_config
from lib.options import integers, parsed, parser_of
from lib.tables import print_rows
from megakd.config.file import dump_config, load_config
from megakd.planning.cluster import Cluster
from megakd.planning.plan import plan_run
from memory.billion import LENGTH, ROWS, Case, decoder, write_teacher, write_texts
from memory.plan import Peaks, peaks_of

TOLERANCE = 0.15
CASE = Case("causal_lm", decoder(28, 1024, 2816, (16, 4), ids=8000), "adamw")
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
    with tempfile.TemporaryDirectory(prefix="megakd-ranks-", dir=given.scratch) as name:
        folder = Path(name)
        write_texts(folder / "data", "causal_lm")
        weights = write_teacher(folder / "model", CASE)
        for ranks in given.ranks:
            planned, base, measured = compared(folder, ranks, given)
            errors = [one / other - 1 for one, other in zip(planned, measured, strict=True)]
            worst = max(worst, *map(abs, errors))
            shard = 4 * weights / ranks
            print(
                f"{ranks} ranks: shard {shard / 1e9:.2f} GB, base {base / 1e9:.2f} GB, "
                f"loading {(measured.load - base) / shard:.2f} shards beside the base",
                flush=True,
            )
            for what, plan, peak, error in zip(
                Peaks._fields, planned, measured, errors, strict=True
            ):
                numbers = f"measured {peak / 1e9:.2f} GB, planned {plan / 1e9:.2f} GB"
                print(f"  {what}: {numbers}", flush=True)
                rows.append(
                    (
                        f"{what}, {weights / 1e9:.2f}B weights, {ranks} ranks",
                        numbers,
                        f"{error:+.1%}",
                    )
                )
    print_rows(given.command, *rows)
    return 1 if worst > TOLERANCE else 0


def compared(folder: Path, ranks: int, given: argparse.Namespace) -> tuple[Peaks, int, Peaks]:
    """Plan and run with so many ranks: what is planned, the process alone, what is measured."""
    out = folder / str(ranks)
    tree = {
        "output_dir": str(out / "run"),
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
    path = write_config(out / "run.yaml", tree)
    config = load_config(path, given.set)
    path.write_text(dump_config(config), encoding="utf-8")
    plan = plan_run(config, Cluster(ranks=ranks), advise=False)
    base = plan.host_base_bytes
    planned = Peaks(plan.load_peak_bytes_per_rank + base, plan.peak_bytes_per_rank + base)
    return planned, base, peaks_of(path, ranks)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--ranks", type=integers, default=(1, 2, 4))
    parser.add_argument("--scratch", type=Path, help="holds up to 12 GB meanwhile")
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    return parsed(parser, __name__, arguments)
