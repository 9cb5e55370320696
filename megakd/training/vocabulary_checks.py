"""Whether the run's tokenizer is the one that pretrained weights were trained with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megakd.data.tokenizers import LOOKED_FOR, from_folder, has_tokenizer_files
from megakd.errors import TeacherError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megakd.config.run import TaskConfig
    from megakd.models.loading import ModelSource

logger = logging.getLogger(__name__)


def check_vocabularies(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, sources: Iterable[ModelSource]
) -> None:
    """Refuse models whose weights were trained with another tokenizer than the run's.

    Raises:
        TeacherError: naming all such models.
    """
    models = list(sources)
    problems = [*without_tokenizer(task, models), *other_vocabularies(task, tokenizer, models)]
    if problems:
        raise TeacherError("\n".join(problems))


def without_tokenizer(task: TaskConfig, sources: Iterable[ModelSource]) -> Iterator[str]:
    """Models with weights and without tokenizer files, one line each; no tokenizer is read.

    Their embeddings mean nothing under a tokenizer that is trained on the run's text, or under
    another model's. A tokenizer that `task.tokenizer` names is taken as told.
    """
    if isinstance(task.tokenizer, str):
        return
    for source, folder in _pretrained(sources):
        if not has_tokenizer_files(folder):
            yield (
                f"{source.where}: {source.name} has weights and no tokenizer files ({LOOKED_FOR}),"
                " and its embeddings fit the tokenizer of their training alone; set "
                "task.tokenizer to a folder or Hub id with that tokenizer"
            )


def other_vocabularies(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, sources: Iterable[ModelSource]
) -> Iterator[str]:
    """Models that come with another tokenizer than the run's, one line each.

    A tokenizer that `task.tokenizer` names is taken as told, with a line in the log.
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
                f"{source.where} {source.name} comes with a tokenizer of {len(own)} tokens, and "
                f"the run's has {len(tokenizer)} others: soft targets need one vocabulary; choose "
                f"models of one tokenizer, or set task.tokenizer if they really share it"
            )


def _tell(
    source: ModelSource, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Say how many tokens mean something else to a model than to the run's tokenizer."""
    vocabulary = tokenizer.get_vocab()
    other = sum(vocabulary.get(token) != number for token, number in own.get_vocab().items())
    if other:
        logger.warning(
            "%s: %d of the %d tokens of the model's own tokenizer have another number, or none, "
            "in task.tokenizer %s, which is used as told",
            source.where,
            other,
            len(own),
            tokenizer.name_or_path,
        )


def _pretrained(sources: Iterable[ModelSource]) -> Iterator[tuple[ModelSource, Path]]:
    """The models with stored weights, each folder once."""
    seen: set[Path] = set()
    for source in sources:
        if source.folder is not None and source.folder not in seen:
            seen.add(source.folder)
            yield source, source.folder
