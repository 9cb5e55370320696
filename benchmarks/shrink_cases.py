"""The cases of the benchmark of shrink: a teacher, its text, and the candidates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import books_case
import stories_case

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

Config = dict[str, Any]


class ShrinkCase(NamedTuple):
    """A teacher that is cut.

    what: the teacher, for the table.
    out: folder of the runs below runs/bench/shrink.
    parts: paths that must exist below the data folder.
    prepare: makes what the sections read. sections: the sections `task` and `teacher`.
    layers: layers of the teacher. depths: numbers of layers of the candidates.
    sparsity: share of the teacher's weights to remove. train: rows of a step and the rate.
    """

    what: str
    out: str
    parts: tuple[Path, ...]
    prepare: Callable[[argparse.Namespace], None]
    sections: Callable[[argparse.Namespace], Config]
    layers: int
    depths: tuple[int, ...]
    sparsity: float
    train: Mapping[str, Any]


def _prepare_stories(given: argparse.Namespace) -> None:
    stories_case.write_stories_tokenizer(given.data, given.out)


def _stories(given: argparse.Namespace) -> Config:
    return {
        "task": stories_case.stories_task(given.data, given.out),
        "teacher": stories_case.stories_teacher(given.data),
    }


def _prepare_books(given: argparse.Namespace) -> None:
    books_case.train_books_teacher(given.data, given.teacher, jobs=given.jobs)


def _books(given: argparse.Namespace) -> Config:
    return {
        "task": books_case.books_task(given.data),
        "teacher": books_case.books_teacher(given.teacher),
    }


CASES = {
    "stories": ShrinkCase(
        what="a pretrained Llama of 260,032 weights",
        out="",
        parts=stories_case.PARTS,
        prepare=_prepare_stories,
        sections=_stories,
        layers=stories_case.LAYERS,
        # The student does not fit into fewer layers.
        depths=(5, 4, 3, 2),
        sparsity=0.6,
        train=stories_case.TRAIN,
    ),
    "books": ShrinkCase(
        what="a Llama of 1,473,152 weights, trained on novels,",
        out="books",
        parts=books_case.PARTS,
        prepare=_prepare_books,
        sections=_books,
        layers=books_case.LAYERS,
        depths=(6, 4, 3, 2),
        # The embeddings stay whole and are a quarter of the weights, so that the layers keep a
        # fifth of their weights.
        sparsity=0.6,
        train=books_case.TRAIN,
    ),
}
