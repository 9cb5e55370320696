"""Speed of the collators of mixed-vocabulary training on one core.

`python benchmarks speed.mixed_text [--data ../shared/data]` encodes texts with a student vocabulary
of 4928 pieces and a teacher vocabulary of 8000 pieces, both WordPiece and trained on the texts, in
rows of 128 tokens. It then measures the teacher's `MixedText`, and the student's `Collator` and
`Masking` on the same rows. The texts are the books of `lm/standard-ebooks`, or the embedded corpus
pydocs without --data. CPU time; tokens are those of the made batches, without padding.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from numpy.typing import NDArray

from lib.clocks import by_turns
from lib.launching import UnusableError
from lib.options import parsed, parser_of
from lib.tables import print_rows, spread_of
from megakd.config.task import TaskConfig
from megakd.contract.batch import Batch
from megakd.data.collation import Collator
from megakd.data.masking import task_masking
from megakd.data.pydocs import pydocs_rows
from megakd.data.token_tables import documents_of
from megakd.data.tokenizers import VocabularyPair
from megakd.data.vocabularies import train_tokenizer
from megakd.methods.mixed_vocabulary.mixed_text import MixedText, encode_mixed

Make = Callable[[pa.Table, NDArray[np.int64]], Batch]


STUDENT_PIECES, TEACHER_PIECES = 4928, 8000
LENGTH = 128
ROWS = (16, 32)


class MicroBatch(NamedTuple):
    """Encoded rows, read before the clock starts, and their numbers."""

    rows: pa.Table
    numbers: NDArray[np.int64]


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=Path, help="folder with lm/standard-ebooks")
    parser.add_argument("--texts", type=int, default=600, help="pieces of text to encode")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--probability", type=float, default=0.5)
    parser.add_argument("--whole_words", action="store_true", help="mask whole words")
    given = parsed(parser, __name__, arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    task = TaskConfig(
        type="mlm", dataset="pydocs", max_length=LENGTH, whole_word_masking=given.whole_words
    )
    with tempfile.TemporaryDirectory() as folder:
        texts = read_texts(given.data, given.texts, task, Path(folder))
        pair = VocabularyPair(*(trained(texts, size) for size in (STUDENT_PIECES, TEACHER_PIECES)))
        rows = encoded(texts, pair, task, Path(folder))
        speeds = [speed for size in ROWS for speed in measured(rows, pair, task, given, size)]
    numbers = "; ".join(f"{what}: {speed}" for what, speed, _ in speeds)
    quartiles = "quartiles " + "; ".join(between for _, _, between in speeds)
    print_rows(given.command, ("collators of mixed text", numbers, quartiles))
    return 0


def read_texts(data: Path | None, count: int, task: TaskConfig, folder: Path) -> list[str]:
    """Return the first texts of the books, or of the embedded corpus."""
    if data is None:
        found = pydocs_rows(task, cache_dir=folder).splits["train"]
        return found["text"][:count]
    books = sorted((data / "lm/standard-ebooks").glob("*.txt"))
    if not books:
        raise UnusableError(f"{data}/lm/standard-ebooks has no books")
    pieces = [str(record.values["text"]) for record in documents_of(books)]
    return pieces[:: max(1, len(pieces) // count)][:count]


def trained(texts: list[str], size: int) -> Any:
    return train_tokenizer(lambda: texts, kind="wordpiece", vocab_size=size, for_encoder=True)


def encoded(texts: list[str], pair: VocabularyPair, task: TaskConfig, folder: Path) -> Dataset:
    began = time.process_time()
    rows, _ = encode_mixed(
        Dataset.from_dict({"text": texts}), pair, task, content_hash="", cache_dir=folder
    )
    seconds = time.process_time() - began
    words = sum(map(len, rows["fixed"][:]))
    print(
        f"{len(texts)} texts, {words} words, {len(rows)} rows of at most {LENGTH} tokens; "
        f"encoded in {seconds:.1f} CPU s, {words / seconds:,.0f} words/s; "
        f"{len(pair.student)} and {len(pair.teacher)} pieces",
        flush=True,
    )
    return rows


def measured(
    rows: Dataset, pair: VocabularyPair, task: TaskConfig, given: argparse.Namespace, size: int
) -> list[tuple[str, str, str]]:
    """Return the speeds of the teacher's and of the student's collator."""
    table: Any = rows.with_format("arrow")
    order = np.random.default_rng(0).permutation(len(rows))[: len(rows) // size * size]
    began = time.process_time()
    batches = [MicroBatch(table[numbers], numbers) for numbers in order.reshape(-1, size)]
    reading = (time.process_time() - began) / len(batches)
    print(f"{size} rows: {1e6 * reading:.0f} µs to read the rows of a micro-batch", flush=True)
    mixed = MixedText(pair, task, probability=given.probability)
    teacher = partial(mixed, size=size, seed=1, draw=0)
    made = {"MixedText": teacher, "student": student_collator(pair, task)}
    # The first run also warms up.
    tokens = [sum(int(make(*batch).valid.sum()) for batch in batches) for make in made.values()]
    sides = [partial(cpu_seconds, batches, make) for make in made.values()]
    seconds = zip(*by_turns(sides, given.repetitions), strict=True)
    return [
        speed_of(f"{name}, {size} rows", count, each, len(batches))
        for name, count, each in zip(made, tokens, seconds, strict=True)
    ]


def student_collator(pair: VocabularyPair, task: TaskConfig) -> Make:
    """Return a function that makes the student's masked micro-batch."""
    collate, masking = Collator(pair.student, task), task_masking(pair.student, task)
    if masking is None:
        raise ValueError("the task is not mlm")
    return lambda rows, numbers: masking(collate(rows), numbers, seed=1, draw=0)


def cpu_seconds(batches: Sequence[MicroBatch], make: Make, _: int) -> float:
    began = time.process_time()
    for batch in batches:
        make(*batch)
    return time.process_time() - began


def speed_of(
    what: str, tokens: int, seconds: Sequence[float], batches: int
) -> tuple[str, str, str]:
    """Return the median speed, the median time of a micro-batch, and the quartiles."""
    spread = spread_of([tokens / value / 1e6 for value in seconds])
    low, high = spread.quartiles
    each = 1e6 * statistics.median(seconds) / batches
    numbers = f"{spread.median:.2f} M tokens/s, {each:.0f} µs per micro-batch"
    print(f"{what}: {numbers}, quartiles {low:.2f} to {high:.2f}", flush=True)
    return what, numbers, f"{low:.2f} to {high:.2f}"
