"""Seconds from the command to the first step: from texts in the cache, and from encoded data.

`python benchmarks speed.encoded_start [--rows 1000000]`, on the CPU.

Two ranks train one step on made-up texts of two classes: once with the texts read and encoded, then
with the cache of that run, and at last with a folder of `megakd encode` and without the texts. The
two starts that read nothing new take turns.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.data import bert, made_up_texts, write_jsonl
from lib.launching import ROOT, trained, write_config
from lib.options import parsed, parser_of
from lib.tables import print_rows

BERT = bert(2, 32, 2, max_position_embeddings=32) | {"intermediate_size": 64}
FIRST, CACHED, ENCODED = "texts, first", "texts, cached", "encoded"


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    texts = write_texts(given.out / "texts.jsonl", given.rows)
    config = write_config(given.out / "run.yaml", run_config(texts))
    seconds: dict[str, list[float]] = {FIRST: [start_of(given, config, "first", ())]}
    folder = given.out / "encoded"
    program = Path(sys.executable).with_name("megakd")
    words = [str(program), "encode", str(config), "--to", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True)
    for turn in range(given.repeats):
        cached = start_of(given, config, f"cached-{turn}", ())
        seconds.setdefault(CACHED, []).append(cached)
        aside = texts.rename(texts.with_suffix(".aside"))
        encoded = start_of(given, config, f"encoded-{turn}", (f"task.encoded={folder}",))
        seconds.setdefault(ENCODED, []).append(encoded)
        aside.rename(texts)
    show(given, seconds)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/encoded_start"))
    return parsed(parser, __name__, arguments)


def write_texts(path: Path, rows: int) -> Path:
    texts = enumerate(made_up_texts(rows))
    if not path.exists():
        write_jsonl(path, ({"text": text, "label": number % 2} for number, text in texts))
    return path


def run_config(texts: Path) -> dict[str, Any]:
    """One step of a small student; everything before the step is what counts."""
    return {
        "output_dir": "overridden",
        "task": {
            "type": "classification",
            "dataset": str(texts),
            "max_length": 32,
            "tokenizer": {"type": "wordpiece", "vocab_size": 1000},
        },
        "student": {"model": {"config": BERT}, "deepspeed": "zero0"},
        "method": {"name": "finetune"},
        "train": {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1.0e-3},
        "eval": {"keep_best": False, "per_device_eval_batch_size": 128},
        "log": {"report_to": []},
    }


def start_of(given: argparse.Namespace, config: Path, name: str, overrides: Sequence[str]) -> float:
    """Return the seconds of a run before its first model: the start and the data."""
    out = given.out / "runs" / name
    shutil.rmtree(out, ignore_errors=True)
    report = trained(config, out, ranks=given.ranks, overrides=overrides)
    return report["seconds"]["start"] + report["seconds"]["data"]


def show(given: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    parts = [f"{name} {statistics.median(found):.1f} s" for name, found in seconds.items()]
    spread = "; ".join(
        f"{name} {min(found):.1f} to {max(found):.1f} s"
        for name, found in seconds.items()
        if len(found) > 1
    )
    what = f"start and data, {given.rows:,} rows, {given.ranks} ranks"
    print_rows(given.command, (what, ", ".join(parts), spread))
