"""Eleven novels as masked tokens and as a decoder's text, and the encoders that learn from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.data import (
    BOOKS,
    NO_DROPOUT,
    TASKS,
    Config,
    bert,
    llama,
    pieces,
    train_section,
    write_jsonl,
)
from lib.launching import Leg, leg_of, report_of, write_config

EVERY = 20
"""One piece in so many is held out."""
INITIALIZER_RANGE = 0.05
"""Transformers' 0.02 is meant for wide models: 192 wide, the loss falls more slowly with it."""
TEACHER, SHORT, HELD_OUT = "teacher", "teacher-short", "held_out"


class Sizes(NamedTuple):
    """All that makes a run long or short.

    student: the width of the pruned model; heads keep their number.
    piece: characters. pieces: read of every book; None: all.
    sampled: held-out pieces scored during training.
    rows: of a global batch of text. evaluations: of a run of the stage `prune`.
    short: the length of the rows of the students, and of those with which the teacher begins;
        batches have as many tokens. From random weights a model learns sooner in short rows that
        neighbours matter: every position of its table is seen more often.
    start: the step after which the first units are removed, and all of them in `one_shot`.
    task_scored: rows of a task that a model is scored on; None: all.
    bf16: in the training of the teacher.
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
    evaluations: int = 80
    task_steps: int = 800
    task_rows: int = 32
    task_rate: float = 5e-4
    task_scored: int | None = None
    bf16: bool = True

    @property
    def short_rows(self) -> int:
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
    evaluations=5,
    task_steps=4,
    task_rows=4,
    task_scored=40,
    bf16=False,
)


def add_changeable(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    for name in names:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, help="in place of the benchmark's own")


def changed(given: argparse.Namespace, names: Iterable[str]) -> dict[str, int]:
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def check_ranks(parser: argparse.ArgumentParser, given: argparse.Namespace, rows: int) -> None:
    if rows % given.ranks:
        parser.error(f"--ranks: {rows} rows cannot be shared by {given.ranks} ranks")


def write_text(data: Path, folder: Path, sizes: Sizes) -> None:
    train, held_out = list[str](), list[str]()
    for book in sorted((data / BOOKS).glob("*.txt")):
        parts = list(pieces(book.read_text(encoding="utf-8"), sizes.piece))[: sizes.pieces]
        for number, piece in enumerate(parts, start=1):
            (train if number % EVERY else held_out).append(piece)
    step = max(1, len(held_out) // sizes.sampled)
    # About one row of each is scored during training.
    sample = [piece[:450] for piece in held_out[::step][: sizes.sampled]]
    for name, texts in (("train", train), (HELD_OUT, held_out), ("sample", sample)):
        write_jsonl(folder / f"{name}.jsonl", ({"text": text} for text in texts))


def text_task(folder: Path, length: int) -> Config:
    """Masked tokens of the books; the sample is scored during training, all held out at the end."""
    return {
        "type": "mlm",
        "train_files": str(folder / "train.jsonl"),
        "validation_files": str(folder / "sample.jsonl"),
        "evaluation_sets": {HELD_OUT: str(folder / f"{HELD_OUT}.jsonl")},
        "text_columns": ["text"],
        "max_length": length,
    }


def short_config(given: argparse.Namespace) -> Config:
    """An encoder that learns the books from random weights, in short rows."""
    sizes: Sizes = given.sizes
    keys = {"max_position_embeddings": sizes.length, "initializer_range": INITIALIZER_RANGE}
    shape = bert(sizes.layers, sizes.width, sizes.heads, **keys, **NO_DROPOUT)
    tokenizer = {"type": "wordpiece", "vocab_size": sizes.vocabulary}
    task = text_task(given.out / "text", sizes.short) | {"tokenizer": tokenizer}
    return pretraining(task, {"config": shape}, sizes.short_rows, sizes.short_steps, given)


def teacher_config(given: argparse.Namespace) -> Config:
    """The same encoder, which goes on in rows of the full length."""
    sizes: Sizes = given.sizes
    task = text_task(given.out / "text", sizes.length)
    return pretraining(
        task, str(given.out / SHORT / "final"), sizes.rows, sizes.teacher_steps, given
    )


def pretraining(
    task: Config, model: Any, rows: int, steps: int, given: argparse.Namespace
) -> Config:
    train = text_train(rows // given.ranks, steps, given.sizes.teacher_rate)
    every, often = max(1, steps // 20), max(1, steps // 100)
    return {
        "task": task,
        "student": {"model": model, "deepspeed": "zero2"},
        "method": {"name": "finetune"},
        **common_sections(
            train | {"bf16": given.sizes.bf16}, evaluate_every=every, log_every=often
        ),
    }


def task_config(task: str, given: argparse.Namespace) -> Config:
    """A finished model learns a task from its labels; the model wins over it."""
    sizes: Sizes = given.sizes
    section = TASKS[task].section(given.data, given.out)
    # The students have learned no later position.
    section |= {"max_length": sizes.short, "max_eval_examples": sizes.task_scored}
    train = text_train(sizes.task_rows, sizes.task_steps, sizes.task_rate)
    # A model of a stage has the teacher's tokens.
    tokenizer = str(given.out / TEACHER / "final")
    return {
        "task": {"type": "classification", "tokenizer": tokenizer, **section},
        "student": {"model": "overridden", "deepspeed": "zero0"},
        "method": {"name": "finetune"},
        **common_sections(train, evaluate_every=sizes.task_steps, log_every=50),
    }


def task_legs_of(
    out: Path,
    models: Mapping[str, Path],
    tasks: Sequence[str],
    *,
    seed: int,
    overrides: Sequence[str] = (),
) -> list[Leg]:
    """Return a leg per model and task, which overrides the config `task-<task>`."""
    return [
        leg_of(
            out,
            f"{task}-{name}-{seed}",
            f"task-{task}",
            (f"student.model={folder}", f"seed={seed}", *overrides),
        )
        for name, folder in models.items()
        for task in tasks
    ]


def text_train(rows: int, steps: int, rate: float) -> Config:
    return train_section(rows, steps, rate, weight_decay=0.01)


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


DECODER_LAYERS = 6
DECODER_TRAIN = {"per_device_train_batch_size": 4, "learning_rate": 2e-3, "warmup_ratio": 0.02}


def train_decoder(data: Path, folder: Path, *, jobs: int) -> None:
    """Train a Llama of 1.5 million weights on 2.5 million tokens of the books, once."""
    keys = {"max_position_embeddings": 256, "tie_word_embeddings": True}
    shape = llama(DECODER_LAYERS, 128, 8, 344, num_key_value_heads=4, **keys)
    tree = {
        "output_dir": str(folder),
        # The pieces that score shrink are some of those that score the teacher: all are held out.
        "task": decoder_task(data, 64) | {"tokenizer": {"type": "bpe", "vocab_size": 3000}},
        "student": {"model": {"config": shape}, "deepspeed": "zero0"},
        "method": {"name": "finetune"},
        "train": train_section(8, 1200, 2e-3),
        "eval": {"eval_steps": 300},
        "save": {"save_steps": 300},
        "log": {"logging_steps": 50},
    }
    config = write_config(folder.parent / "configs" / f"{folder.name}.yaml", tree)
    report_of(Leg(folder.name, config, folder, ()), ranks=1, jobs=jobs)


def decoder_task(data: Path, held_out: int) -> Config:
    text = {"type": "causal_lm", "dataset": str(data / BOOKS), "max_length": 256}
    return {**text, "max_eval_examples": held_out}
