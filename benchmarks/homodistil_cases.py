"""The text, the tasks and the run configs of `homodistil.py`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

Config = dict[str, Any]
BOOKS = Path("lm/standard-ebooks")
SAMPLE = 450
"""Characters of a held-out piece that are scored during training: about one row."""
EVERY = 20
"""One piece in so many is held out."""
INITIALIZER_RANGE = 0.05
"""Transformers' 0.02 is meant for wide models: 192 wide, the loss falls more slowly with it."""
HELD_OUT = "held_out"
SHORT = "teacher-short"
SECTION = "train"


class Sizes(NamedTuple):
    """All that makes a run long or short.

    student: the width of the pruned model; heads keep their number.
    piece: characters. pieces: read of every book; None: all.
    sampled: held-out pieces scored during training.
    rows: of a global batch of text. evaluations: of a run of the stage `prune`.
    early: the step after which `early` has its final size.
    short: the length of the rows of the students, and of those with which the teacher begins;
        batches have as many tokens. From random weights a model learns sooner in short rows that
        neighbours matter: every position of its table is seen more often.
    start: the step after which the first units are removed, and all of them in `one_shot`.
    task_scored: rows of a task that a model is scored on; None: all.
    """

    layers: int = 4
    width: int = 192
    heads: int = 4
    student: int = 96
    vocabulary: int = 8000
    length: int = 128
    piece: int = 8000
    pieces: int | None = None
    sampled: int = 48
    rows: int = 32
    short: int = 32
    short_steps: int = 4000
    teacher_steps: int = 9000
    teacher_rate: float = 1e-3
    steps: int = 1000
    rate: float = 1e-3
    start: int = 20
    early: int = 300
    evaluations: int = 80
    task_steps: int = 800
    task_rows: int = 32
    task_rate: float = 5e-4
    task_scored: int | None = None

    @property
    def short_rows(self) -> int:
        """The rows of a global batch of short rows."""
        return self.rows * self.length // self.short


QUICK = Sizes(
    layers=2,
    width=32,
    heads=2,
    student=16,
    vocabulary=400,
    length=32,
    piece=400,
    pieces=EVERY,
    sampled=4,
    rows=4,
    short=16,
    short_steps=10,
    teacher_steps=10,
    steps=10,
    start=2,
    early=4,
    evaluations=5,
    task_steps=4,
    task_rows=4,
    task_scored=40,
)


class Task(NamedTuple):
    """A task that finished models are scored on.

    data: must be there, below the folder of real data.
    section: the config's section, of the folder of real data and of a folder for prepared files.
    """

    data: str
    section: Callable[[Path, Path], Config]


def glue(name: str, folder: str, **keys: Any) -> Task:
    """A task of GLUE, scored on its development rows."""
    return Task(
        f"glue/{folder}",
        lambda data, _: {"dataset": f"glue/{name}", "data_dir": str(data / "glue"), **keys},
    )


def banking(data: Path, _: Path) -> Config:
    """77 intents of a bank's customers; the published test rows are the ones scored."""
    files = data / "banking77"
    return {
        "train_files": str(files / "train.csv"),
        "validation_files": str(files / "test.csv"),
        "text_columns": ["text"],
        "label_column": "category",
    }


def clinc(data: Path, folder: Path) -> Config:
    """150 intents without what is out of scope, scored on the validation rows."""
    splits = json.loads((data / "clinc150/data_full.json").read_text(encoding="utf-8"))
    files = {"train_files": splits["train"], "validation_files": splits["val"]}
    task: Config = {"text_columns": ["text"], "label_column": "label"}
    for key, rows in files.items():
        path = folder / "clinc150" / f"{key}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        task[key] = str(path)
    return task


TASKS = {
    "sst2": glue("sst2", "SST-2", labelled_examples=8000),
    "banking77": Task("banking77/train.csv", banking),
    "clinc150": Task("clinc150/data_full.json", clinc),
    "mrpc": glue("mrpc", "MRPC"),
    "cola": glue("cola", "CoLA"),
    "rte": glue("rte", "RTE"),
}
CHOSEN = ("sst2", "banking77", "clinc150")


def write_text(data: Path, folder: Path, sizes: Sizes) -> None:
    """Write the books as pieces: those to learn from, those held out, and a sample of these."""
    train, held_out = list[str](), list[str]()
    for book in sorted((data / BOOKS).glob("*.txt")):
        found = list(pieces(book.read_text(encoding="utf-8"), sizes.piece))[: sizes.pieces]
        for number, piece in enumerate(found, start=1):
            (train if number % EVERY else held_out).append(piece)
    step = max(1, len(held_out) // sizes.sampled)
    sample = [piece[:SAMPLE] for piece in held_out[::step][: sizes.sampled]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in ((SECTION, train), (HELD_OUT, held_out), ("sample", sample)):
        _write_lines(folder / f"{name}.jsonl", texts)


def pieces(text: str, characters: int) -> Iterator[str]:
    """Whole paragraphs, together of about so many characters."""
    found = list[str]()
    for paragraph in text.split("\n\n"):
        found.append(paragraph)
        if sum(map(len, found)) >= characters:
            yield "\n\n".join(found)
            found = []
    if found:
        yield "\n\n".join(found)


def _write_lines(path: Path, texts: Sequence[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    path.write_text(lines, encoding="utf-8")


def text_task(folder: Path, length: int) -> Config:
    """Masked tokens of the books; the sample is scored during training, all held out at the end."""
    return {
        "type": "mlm",
        "train_files": str(folder / f"{SECTION}.jsonl"),
        "validation_files": str(folder / "sample.jsonl"),
        "evaluation_sets": {HELD_OUT: str(folder / f"{HELD_OUT}.jsonl")},
        "text_columns": ["text"],
        "max_length": length,
    }


def short_config(folder: Path, given: argparse.Namespace) -> Config:
    """An encoder that learns the books from random weights, in short rows."""
    sizes: Sizes = given.sizes
    shape = {
        "model_type": "bert",
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": sizes.length,
        "initializer_range": INITIALIZER_RANGE,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    tokenizer = {"type": "wordpiece", "vocab_size": sizes.vocabulary}
    task = text_task(folder / "text", sizes.short) | {"tokenizer": tokenizer}
    return _pretraining(task, {"config": shape}, sizes.short_rows, sizes.short_steps, given)


def teacher_config(folder: Path, given: argparse.Namespace) -> Config:
    """The same encoder, which goes on in rows of the full length."""
    sizes: Sizes = given.sizes
    task = text_task(folder / "text", sizes.length)
    start = str(folder / SHORT / "final")
    return _pretraining(task, start, sizes.rows, sizes.teacher_steps, given)


def _pretraining(
    task: Config, model: Any, rows: int, steps: int, given: argparse.Namespace
) -> Config:
    train = train_section(rows // given.ranks, steps, given.sizes.teacher_rate) | {
        "bf16": given.bf16
    }
    return {
        "task": task,
        "student": {"model": model, "deepspeed": "zero2"},
        "method": {"name": "finetune"},
        **common_sections(
            train, evaluate_every=max(1, steps // 20), log_every=max(1, steps // 100)
        ),
    }


def pruning_config(folder: Path, given: argparse.Namespace) -> Config:
    """A student that is pruned out of the teacher; the schedule and the baselines win over it."""
    sizes: Sizes = given.sizes
    method = {
        "name": "homodistil",
        "target_width": sizes.student,
        "pruning_start": sizes.start,
    }
    train = train_section(sizes.short_rows // given.ranks, sizes.steps, sizes.rate)
    every = max(1, sizes.steps // sizes.evaluations)
    return {
        "task": text_task(folder / "text", sizes.short),
        "teacher": {"model": str(folder / "teacher" / "final"), "deepspeed": "teacher_zero0"},
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": method,
        **common_sections(train, evaluate_every=every, log_every=every),
    }


def task_config(task: str, folder: Path, given: argparse.Namespace) -> Config:
    """A finished model learns a task from its labels; the model wins over it."""
    sizes: Sizes = given.sizes
    section = TASKS[task].section(given.data, folder)
    # The students have learned no later position.
    section |= {"max_length": sizes.short, "max_eval_examples": sizes.task_scored}
    train = train_section(sizes.task_rows, sizes.task_steps, sizes.task_rate)
    return {
        # A model of a stage has the teacher's tokens.
        "task": {
            "type": "classification",
            "tokenizer": str(folder / "teacher" / "final"),
            **section,
        },
        "student": {"model": "overridden", "deepspeed": "zero0"},
        "method": {"name": "finetune"},
        **common_sections(train, evaluate_every=sizes.task_steps, log_every=50),
    }


def train_section(rows: int, steps: int, rate: float) -> Config:
    """The section `train`: so many rows of every rank, and a rate that falls to 0."""
    return {
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "weight_decay": 0.01,
    }


def common_sections(train: Config, *, evaluate_every: int, log_every: int) -> Config:
    """Whatever was learned last is the result: no evaluation chooses it."""
    return {
        "train": train,
        "eval": {
            "eval_steps": evaluate_every,
            "per_device_eval_batch_size": 96,
            "keep_best": False,
        },
        "save": {"save_steps": max(1, train["max_steps"] // 10), "save_total_limit": 1},
        "log": {"logging_steps": log_every},
    }
