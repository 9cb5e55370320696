"""The rows of a run: read, measured and encoded once per node, and mapped by all its ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import accumulate, takewhile
from typing import TypeVar, cast

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megakd.config.run import RunConfig
from megakd.config.task import MOST_TOKENS, TaskConfig
from megakd.data.arrow import cache_folder, longest_of
from megakd.data.chat.conversations import is_chat
from megakd.data.encoding import Encoded, encode_rows, encode_splits, mixed
from megakd.data.loader import lengths_of_rows, prompt_lengths
from megakd.data.splits import Splits, load_splits
from megakd.engine.collectives import main_first, on_main, once_per_node
from megakd.errors import ConfigError
from megakd.models.architectures import context_length
from megakd.models.packing import check_varlen, packing_at
from megakd.models.source import ModelSource

T = TypeVar("T")
logger = logging.getLogger(__name__)
PARTS = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
LEAST_PACKED = 1024
"""Short documents need no short rows: rows are packed, and short rows would cut many of them."""
MOST_ROWS, MOST_CHARACTERS = 10_000, 20_000_000
"""Rows and characters that are measured at most, so that the cost does not grow with the data."""


def splits_of(config: RunConfig) -> Splits:
    """Return the texts and labels of a run; a collective."""
    task, seed = config.task, config.seed
    return once(config, lambda: load_splits(task, seed=seed, cache_dir=cache_folder()))


def encoded_rows(
    config: RunConfig,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    *,
    with_train: bool = True,
) -> Encoded:
    """Return the data as token numbers; a collective."""
    task, cache = config.task, cache_folder()
    encoded = once(
        config,
        lambda: encode_splits(
            splits,
            tokenizer,
            task,
            cache_dir=cache,
            with_train=with_train,
            packed=config.train.packing is not False,
        ),
    )
    if task.mixture is None or not with_train:
        return encoded
    return mixed(encoded, task.mixture, seed=config.seed)


def once(config: RunConfig, action: Callable[[], T]) -> T:
    """Return what `action` writes or finds in the cache; only one rank per node runs it."""
    if config.task.streaming:
        return main_first(action)  # a stream reads its files on every rank
    return once_per_node(action, place=str(cache_folder()))


def with_multi_label(config: RunConfig, splits: Splits) -> RunConfig:
    """Return the config with `task.multi_label` as the data have it."""
    if config.task.type != "classification":
        return config
    return replace(config, task=replace(config.task, multi_label=splits.multi_label))


def with_packing(
    config: RunConfig, splits: Splits, sources: Mapping[str, ModelSource]
) -> RunConfig:
    """Return the config with `train.packing` decided for all models; a collective.

    Raises:
        ConfigError: rows are to be packed, and a model does not keep the texts of a row apart.
        ModelError: see `check_varlen`.
    """
    train, rows = config.train, splits.train if splits.stream is None else splits.validation
    if config.task.type != "causal_lm" or train.packing is False:
        return config

    def mixing_models() -> list[str]:
        names: list[str] = []
        for role, source in sources.items():  # a server gets every text by itself
            if role not in config.teacher_specs or config.teacher_specs[role].server is None:
                check_varlen(source.config, source)
                if packing_at(source.where, source.config, source.attn_implementation) == "apart":
                    names.append(f"{source.where} ({source.config.model_type})")
        return names

    mixing = " and ".join(on_main(mixing_models))
    if not mixing:
        return replace(config, train=replace(train, packing=True))
    trainings = config.trainings.items()
    packs = [f"{where}.tokens_per_rank" for where, t in trainings if t.tokens_per_rank is not None]
    packs += ["train.packing: true"] * (train.packing is True)
    if packs:
        raise ConfigError(
            f"{packs[0]} packs several texts into a row, and {mixing} would not compute them there "
            "as it computes them alone; remove the key, so that every row has one text"
        )
    if not is_chat(rows):
        logger.info(
            "train.packing: false (auto): every row has one text, because %s would not compute "
            "several texts in a row as it computes them alone",
            mixing,
        )
    return replace(config, train=replace(train, packing=False))


def with_row_length(
    config: RunConfig,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, ModelSource],
) -> RunConfig:
    """Return the config with `task.max_length`, and log what it means for the rows; a collective.

    A length that is not given is that of 99 % of the training rows, or of their prompts and the
    texts that the run generates, up to the context of all models. Nobody knows the rows of a
    stream, so that its held-out rows are measured.
    """
    task, rows = config.task, splits.train if splits.stream is None else splits.validation
    # mlm splits texts into windows; the lines of conversations tell their lengths.
    if task.type == "mlm" or (task.max_length is not None and is_chat(rows)):
        return config
    tokens, prompts, read = once(config, lambda: _lengths(rows, tokenizer, task))
    parts = {name: longest_of(tokens, part) for name, part in PARTS.items()}
    told = ", ".join(f"{name} {length:,}" for name, length in parts.items()) + " tokens"
    if read < len(rows):
        told += f" ({read:,} of {len(rows):,} rows)"
    if task.max_length is None:
        # Documents of a mixture are not measured.
        is_single = is_chat(rows) or config.train.packing is False
        least = 2 if is_single and len(tokens) else LEAST_PACKED
        prompt = longest_of(prompts, 0.99)
        length, limit = _chosen_length(max(least, parts["p99"]), prompt, config, sources)
        logger.info("task.max_length: %d (not set; %s); the rows have %s", length, limit, told)
        return replace(config, task=replace(task, max_length=length))
    if task.type == "causal_lm" or parts["p99"] <= task.max_length:
        logger.info("the rows have %s", told)
    else:
        logger.warning(
            "%.1f %% of the rows are cut at task.max_length %d; the rows have %s; "
            "task.max_length=%d keeps 99 %% of them whole",
            *(100 * (tokens > task.max_length).mean(), task.max_length, told, parts["p99"]),
        )
    return config


def _chosen_length(
    row: int, prompt: int, config: RunConfig, sources: Mapping[str, ModelSource]
) -> tuple[int, str]:
    # The length for rows, and for prompts with generated texts, in tokens; and what limits it.
    sections = [part for part in (config.rollout, config.eval.generation) if part is not None]
    wanted = max(
        [row, *((part.prompt_tokens or prompt) + part.max_new_tokens for part in sections)]
    )
    limits = [(context_length(s.config), f"the context of {s.where}") for s in sources.values()]
    limits += [
        (t.tokens_per_rank, f"{where}.tokens_per_rank") for where, t in config.trainings.items()
    ]
    rounded = -(-wanted // 8) * 8
    return min([(rounded, "for 99 % of the rows"), *((n, name) for n, name in limits if n)])


def _lengths(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: TaskConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    # [n] tokens of whole rows, [n] of the prompts in them, and the number of rows that were read.
    sample = rows.select(np.random.default_rng(0).permutation(len(rows))[:MOST_ROWS])
    sizes = accumulate(map(len, cast("Iterable[str]", sample["text"])))
    count = 1 + sum(1 for _ in takewhile(lambda size: size < MOST_CHARACTERS, sizes))
    sample = sample.select(range(min(count, len(sample))))
    whole = replace(task, max_length=MOST_TOKENS, truncation="keep_start")
    made, _ = encode_rows(
        sample, tokenizer, whole, name="a sample", cache_dir=cache_folder(), packed=False
    )
    tokens = lengths_of_rows(made)
    if not is_chat(rows):
        return tokens, np.zeros_like(tokens), len(sample)
    prompts = prompt_lengths(made)
    # Documents beside conversations are cut anywhere.
    return tokens[prompts > 0], prompts[prompts > 0], len(sample)
