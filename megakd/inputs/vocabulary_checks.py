"""Checks that the run's tokenizer is the tokenizer that pretrained weights were trained with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.data.tokenizers import LOOKED_FOR, from_folder, has_tokenizer_files
from megakd.errors import TeacherError
from megakd.models.source import ModelSource

logger = logging.getLogger(__name__)


def check_vocabularies(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, sources: Iterable[ModelSource]
) -> None:
    """Raise if a model's weights were trained with a tokenizer other than the run's."""
    models = list(sources)
    problems = [*without_tokenizer(task, models), *other_vocabularies(task, tokenizer, models)]
    if problems:
        raise TeacherError("\n".join(problems))


def without_tokenizer(task: TaskConfig, sources: Iterable[ModelSource]) -> Iterator[str]:
    """Yield an error for each model with weights and without tokenizer files; read no tokenizer.

    The embeddings of such a model mean nothing with a tokenizer that is trained on the run's text,
    or with another model's tokenizer. A tokenizer that `task.tokenizer` names is accepted.
    """
    if isinstance(task.tokenizer, str):
        return
    for source, folder in _pretrained(sources):
        if not has_tokenizer_files(folder):
            yield (
                f"{source.where}: {source.name} has weights and no tokenizer files ({LOOKED_FOR}), "
                "and its embeddings fit only the tokenizer of its training; set task.tokenizer to "
                "a folder or Hub id with that tokenizer"
            )


def other_vocabularies(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, sources: Iterable[ModelSource]
) -> Iterator[str]:
    """Yield an error for each model that comes with another tokenizer than the run's.

    A tokenizer that `task.tokenizer` names is accepted, with a line in the log.
    """
    vocabulary = tokenizer.get_vocab()
    for source, folder in _pretrained(sources):
        if not has_tokenizer_files(folder):
            continue
        own = from_folder(folder, task.type)
        if own.get_vocab() == vocabulary:
            continue
        if isinstance(task.tokenizer, str):
            _tell(source, own, tokenizer)
        else:
            yield (
                f"{source.where} {source.name} has a tokenizer of {len(own)} tokens, and the run "
                f"has another tokenizer, of {len(tokenizer)} tokens; soft targets need one "
                "vocabulary: choose models with the same tokenizer, or set task.tokenizer if the "
                "models share one"
            )


def _tell(
    source: ModelSource, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> None:
    vocabulary = tokenizer.get_vocab()
    other = sum(vocabulary.get(token) != number for token, number in own.get_vocab().items())
    if other:
        logger.warning(
            "%s: %d of the %d tokens of the model's own tokenizer have another id, or no id, in "
            "task.tokenizer %s, which is used as configured",
            source.where,
            other,
            len(own),
            tokenizer.name_or_path,
        )


def _pretrained(sources: Iterable[ModelSource]) -> Iterator[tuple[ModelSource, Path]]:
    seen: set[Path] = set()
    for source in sources:
        if source.folder is not None and source.folder not in seen:
            seen.add(source.folder)
            yield source, source.folder
