"""The rows of a run, read or encoded once per node and memory-mapped by all ranks of the node."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from megakd.config.run import RunConfig
from megakd.data.cache import cache_folder
from megakd.data.encoded_folder import as_encoded, facts_of, open_splits
from megakd.data.encoding import Encoded, encode_splits
from megakd.data.mixed_text import encode_mixed
from megakd.data.shared_words import VocabularyPair
from megakd.data.splits import Splits, load_splits
from megakd.engine.collectives import main_first, once_per_node

T = TypeVar("T")


class MixedRows(NamedTuple):
    """Training rows that are encoded for two vocabularies, and their key; see `data.mixed_text`."""

    rows: Dataset
    key: str


def splits_of(config: RunConfig) -> Splits:
    """Return the texts and labels of a run; a collective.

    With `task.encoded` the rows are token numbers and labels, without texts.
    """
    task = config.task
    if task.encoded is not None:
        folder = task.encoded
        return once_per_node(lambda: open_splits(folder), place=str(folder))
    return once(config, lambda: load_splits(task, seed=config.seed, cache_dir=cache_folder()))


def encoded_rows(
    config: RunConfig,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    *,
    with_train: bool = True,
) -> Encoded:
    """Return the data as token numbers; a collective."""
    task, cache = config.task, cache_folder()
    if task.encoded is not None:
        facts = facts_of(task, tokenizer, seed=config.seed)
        return as_encoded(task.encoded, splits, tokenizer, facts)
    return once(
        config,
        lambda: encode_splits(splits, tokenizer, task, cache_dir=cache, with_train=with_train),
    )


def once(config: RunConfig, action: Callable[[], T]) -> T:
    """Return what `action` writes or finds in the cache; only one rank per node runs it."""
    if config.task.streaming:
        return main_first(action)  # a stream reads its files on every rank
    return once_per_node(action, place=str(cache_folder()))


def mixed_rows(config: RunConfig, splits: Splits, pair: VocabularyPair | None) -> MixedRows | None:
    """Return the training rows for both vocabularies, if the method reads such rows; collective."""
    if pair is None or not config.method.reads_mixed_rows(config):
        return None
    made = once(
        config,
        lambda: encode_mixed(
            splits.train,
            pair,
            config.task,
            content_hash=splits.content_hash,
            cache_dir=cache_folder(),
        ),
    )
    return MixedRows(*made)
