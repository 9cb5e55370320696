"""A teacher's answers to all training rows: computed once, then read from disk in any run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.data.encoding import tokenizer_content
from megakd.storage.fingerprint import Fingerprint, flatten
from megakd.teachers.cached import Answers, CachedTeacher, Layout, build_cache
from megakd.training.cached_tokens import (
    ask_tokens,
    bytes_per_token,
    kept_facts,
    whole_answers,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from megakd.contract.batch import Batch
    from megakd.models.source import ReadyTeacher
    from megakd.teachers.frozen import FrozenTeacher
    from megakd.training.assembly import Assembly


def open_cache(assembly: Assembly, ready: ReadyTeacher, folder: Path) -> CachedTeacher:
    """Return a teacher whose answers are read from disk.

    Raises:
        TeacherError: the answers are damaged, incomplete, or for other inputs.
    """
    return CachedTeacher(folder, _facts(assembly, ready), assembly.ranks)


def fill_cache(assembly: Assembly, ready: ReadyTeacher, folder: Path) -> None:
    """Query a teacher with every training row and cache its answers; a collective.

    Raises:
        MegakdError: the teacher cannot be used, or the folder holds other answers.
    """
    encoded = assembly.prepared.encoded
    build_cache(
        folder,
        _facts(assembly, ready),
        encoded.train,
        ranks=assembly.ranks,
        layout=Layout(_bytes_per_row(assembly, ready), encoded.tokens_per_row),
        asking=lambda: _asking(assembly, ready),
    )


@contextmanager
def _asking(assembly: Assembly, ready: ReadyTeacher) -> Iterator[Callable[[Dataset, int], Answers]]:
    dtype = assembly.teacher_dtype(ready)
    with assembly.loaded(ready.source, ready.spec.deepspeed, dtype) as model:
        yield lambda rows, first: _answers(assembly, model, ready, rows, first)


def _answers(
    assembly: Assembly, model: FrozenTeacher, ready: ReadyTeacher, rows: Dataset, first: int
) -> Answers:
    task, scorer = assembly.config.task, assembly.scorer()
    if task.type != "causal_lm":
        return {"logits": scorer.outputs(model.predict, rows).float()}

    def ask(batch: Batch) -> dict[str, torch.Tensor]:
        return ask_tokens(model, batch, ready.spec, length=task.row_length)

    return whole_answers(scorer.answers(ask, rows, first=first), first=first)


def _bytes_per_row(assembly: Assembly, ready: ReadyTeacher) -> int:
    """Return the bytes of one row: fp32 logits, or the tokens of all positions."""
    task = assembly.config.task
    if task.type == "causal_lm":
        return task.row_length * bytes_per_token(ready.spec)
    return 4 * max(1, len(assembly.prepared.splits.label_names))


def _facts(assembly: Assembly, ready: ReadyTeacher) -> Fingerprint:
    task, prepared = assembly.config.task, assembly.prepared
    facts: dict[str, Any] = {
        "task": task.type,
        "labels": list(prepared.splits.label_names),
        "max_length": task.row_length,
        "texts": assembly.texts_key,
        "tokenizer": tokenizer_content(prepared.tokenizer),
        "teacher": assembly.identity_of(ready.source),
        "dtype": assembly.teacher_dtype(ready),
    }
    if task.type == "causal_lm":
        facts |= kept_facts(ready.spec)
    return flatten(facts)
