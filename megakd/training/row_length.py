"""The length of rows: given as `task.max_length`, or measured on the training rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from megakd.config.training_checks import trainings
from megakd.data.chat_rows import is_chat
from megakd.data.encoded_folder import read_manifest
from megakd.data.lengths import measured_lengths
from megakd.data.rows import longest_of
from megakd.models.generation import context_length
from megakd.training.run_data import cache_folder, once

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from megakd.config.run import RunConfig
    from megakd.data.lengths import Lengths
    from megakd.data.rows import Histogram
    from megakd.models.source import ModelSource

logger = logging.getLogger(__name__)
KEPT = 0.99
"""Share of the rows that a measured length keeps whole."""
PARTS = {"p50": 0.5, "p95": 0.95, "p99": KEPT, "longest": 1.0}
LEAST_PACKED = 1024
"""Short documents need no short rows: rows are packed, and short rows would cut many of them."""
MULTIPLE = 8


def with_row_length(
    config: RunConfig,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, ModelSource],
) -> RunConfig:
    """Return the config with `task.max_length`, and log what it means for the rows; a collective.

    A length that is not given is that of 99 % of the rows, or of their prompts and the texts that
    the run generates, up to the context of all models.

    Args:
        config: the config of a run.
        rows: the training rows, or the held-out rows of a stream, whose length nobody knows.
        tokenizer: the tokenizer of the rows.
        sources: the models by role.
    """
    task = config.task
    if task.encoded is not None:
        given = task.max_length or read_manifest(task.encoded)["facts"]["task.max_length"]
        return replace(config, task=replace(task, max_length=given))
    # mlm splits texts into windows; the table of conversations tells their lengths.
    if task.type == "mlm" or (task.max_length is not None and is_chat(rows)):
        return config
    measured = once(
        config, lambda: measured_lengths(rows, tokenizer, task, cache_dir=cache_folder())
    )
    told = _told(measured.tokens, of=len(rows))
    longest = longest_of(measured.tokens, KEPT)
    if task.max_length is None:
        wanted = max(longest, _generated(config, measured), 2 if is_chat(rows) else LEAST_PACKED)
        limit, length = _least(config, sources, -(-wanted // MULTIPLE) * MULTIPLE)
        logger.info("task.max_length: %d (not set; %s); the rows have %s", length, limit, told)
        config = replace(config, task=replace(task, max_length=length))
    elif task.type == "causal_lm" or longest <= task.max_length:
        logger.info("the rows have %s", told)
    else:
        cut = sum(c for n, c in measured.tokens.items() if n > task.max_length)
        logger.warning(
            "%.1f %% of the rows are cut at task.max_length %d; the rows have %s; "
            "task.max_length=%d keeps 99 %% of them whole",
            *(100 * cut / sum(measured.tokens.values()), task.max_length, told, longest),
        )
    return config


def _told(lengths: Histogram, *, of: int) -> str:
    count = sum(lengths.values())
    parts = {name: longest_of(lengths, part) for name, part in PARTS.items()}
    listed = ", ".join(f"{name} {length:,}" for name, length in parts.items())
    return f"{listed} tokens" + ("" if count == of else f" ({count:,} of {of:,} rows)")


def _generated(config: RunConfig, measured: Lengths) -> int:
    """Return the length of the prompts with the longest texts that the run generates."""
    prompt, longest = longest_of(measured.prompts, KEPT), 0
    if config.rollout is not None:
        longest = (config.rollout.prompt_tokens or prompt) + config.rollout.longest
    if config.eval.generation is not None:
        asked = config.eval.generation
        longest = max(longest, (asked.prompt_tokens or prompt) + asked.max_new_tokens)
    return longest


def _least(config: RunConfig, sources: Mapping[str, ModelSource], wanted: int) -> tuple[str, int]:
    """Return the wanted length, or a smaller limit of the run, and what has decided."""
    limits: list[tuple[int | None, str]] = [
        (train.tokens_per_rank, f"the limit of {where}.tokens_per_rank")
        for where, train in trainings(config)
    ]
    for source in sources.values():
        limits.append((context_length(source.config), f"the context of {source.where}"))
        positions = source.architecture.longest_input(source.config)
        limits.append((positions, f"the positions of {source.where}"))
    known = [(limit, name) for limit, name in limits if limit is not None and limit < wanted]
    length, name = min(known, default=(wanted, "for 99 % of the rows"))
    return name, length
