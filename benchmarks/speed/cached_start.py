"""CPU seconds until the rows of a run are there: the first time, and with everything in the cache.

`python benchmarks speed.cached_start [--rows 200000] [--against CHECKOUT]`, on the CPU.

Made-up texts of two classes and conversations with two answers to each prompt are read and encoded
as rank 0 of a run does, without models. Every start is a process of its own, forked after the
imports. With `--against`, another checkout of megakd is measured as well, with a cache of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.data import made_up_texts, write_jsonl
from lib.launching import BENCHMARKS, ROOT, code_of
from lib.options import parsed, parser_of
from lib.tables import print_rows

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
KINDS = ("texts", "conversations")


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.start is not None:
        starts(given)
        return 0
    checkouts = [ROOT, *filter(None, [given.against])]
    for kind in KINDS:
        write_rows(given.out / f"{kind}.jsonl", kind, given.rows)
        for checkout in checkouts:
            shutil.rmtree(given.out / "caches" / checkout.name, ignore_errors=True)
            first, *cached = with_code_of(checkout, given, kind)
            show(given, f"{kind}, {checkout.name}", first, cached)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/bench/cached_start")
    parser.add_argument("--start", choices=KINDS, help=argparse.SUPPRESS)
    given = parsed(parser, __name__, arguments)
    given.against = given.against and given.against.resolve()
    return given


def write_rows(path: Path, kind: str, count: int) -> None:
    """Write made-up rows, anew if their number differs."""
    row = conversation if kind == "conversations" else labelled
    write_jsonl(path, (row(*numbered) for numbered in enumerate(made_up_texts(count))))
    # A file that was just written may change again within a tick of the clock.
    time.sleep(3)


def labelled(number: int, text: str) -> dict[str, Any]:
    return {"text": text, "label": number % 2}


def conversation(number: int, text: str) -> dict[str, Any]:
    question = {"role": "user", "content": f"Which film is number {number // 2}?"}
    return {"messages": [question, {"role": "assistant", "content": text}]}


def with_code_of(checkout: Path, given: argparse.Namespace, kind: str) -> list[float]:
    """Return the CPU seconds of several starts with the code of a checkout."""
    words = {"start": kind, "rows": given.rows, "repeats": given.repeats, "out": given.out}
    options = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    cache = {"MEGAKD_CACHE": str(given.out / "caches" / checkout.name)}
    environment = code_of(checkout) | cache | {"TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(BENCHMARKS), __name__, *options]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.splitlines()]


def starts(given: argparse.Namespace) -> None:
    """Print the CPU seconds of a first start and of the starts after it, each in a fork."""
    import megakd.data.splits
    import megakd.data.tokenizers
    import megakd.inputs.run_data  # noqa: F401

    for _ in range(given.repeats + 1):
        if (child := os.fork()) == 0:
            print(start(given.start, given.out, given.rows), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"a start failed with status {status}")


def start(kind: str, out: Path, rows: int) -> float:
    """Read and encode the rows as rank 0 does, and return the CPU seconds without imports."""
    from megakd.config.task import TaskConfig, TokenizerConfig
    from megakd.data.encoding import encode_splits
    from megakd.data.splits import load_splits
    from megakd.data.tokenizers import load_tokenizer
    from megakd.inputs.run_data import cache_folder

    is_chat = kind == "conversations"
    template = out / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    task = TaskConfig(
        type="causal_lm" if is_chat else "classification",
        dataset=str(out / f"{kind}.jsonl"),
        max_length=64,
        tokenizer=TokenizerConfig(type="bpe" if is_chat else "wordpiece", vocab_size=1000),
        **({"chat_template": str(template)} if is_chat else {}),
    )
    begun = time.process_time()
    splits = load_splits(task, seed=1, cache_dir=cache_folder())
    tokenizer = load_tokenizer(task, splits, model_folders=[], cache_dir=cache_folder())
    encoded = encode_splits(splits, tokenizer, task, cache_dir=cache_folder())
    seconds = time.process_time() - begun
    read = len(splits.train) + len(splits.validation)
    if not len(encoded.train) or read > rows:
        raise ValueError(f"{read} of {rows} rows were read, {len(encoded.train)} encoded")
    return seconds


def show(given: argparse.Namespace, what: str, first: float, cached: Sequence[float]) -> None:
    parts = f"first {first:.1f} s, cached {statistics.median(cached):.2f} s"
    spread = f"{min(cached):.2f} to {max(cached):.2f} s"
    print_rows(given.command, (f"CPU, {given.rows:,} {what}", parts, spread))
