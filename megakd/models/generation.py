"""Completions of prompts by a model, independent of the batch they are in, and its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import GENERATION_CONFIG_NAME

from megakd.contract.completions import Completion, Sampling, TextTokens
from megakd.engine.sharding import evaluating
from megakd.errors import DataError, ModelError
from megakd.models.architecture import context_length
from megakd.models.continuation import continued
from megakd.models.packed_attention import VARLEN
from megakd.models.source import ModelSource
from megakd.storage.folders import check_given

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    tokens: TextTokens,
    rows_at_once: int,
) -> list[Completion]:
    """Continue prompts with a causal language model with whole weights.

    A completion depends on the weights, the prompt, the seed and `sampling`. The other prompts and
    `rows_at_once` only change the rounding of the logits. The random generators, the model's
    settings and the mode of its modules are the same afterwards. Texts may contain the token of the
    padding.
    """
    if not isinstance(model, GenerationMixin):
        raise ModelError(
            f"{type(model).__name__} cannot generate text; use a causal language model"
        )
    generative: Any = model
    lengths = [len(prompt) for prompt in prompts]
    check_prompt_lengths(lengths, sampling.max_new_tokens, context_length(generative.config))
    completions: dict[int, Completion] = {}
    with torch.no_grad(), evaluating(model), without_settings(generative):
        for rows in _batches(lengths, rows_at_once):
            chosen = [prompts[row] for row in rows], [seeds[row] for row in rows]
            texts = continued(generative, *chosen, sampling, tokens)
            completions |= zip(rows, (_completion(ids, tokens.end) for ids in texts), strict=True)
    return [completions[row] for row in range(len(prompts))]


def generation_config_of(source: ModelSource) -> GenerationConfig | None:
    """Return the generation config in a model's folder, which may list further end tokens."""
    if source.folder is None or not (Path(source.folder) / GENERATION_CONFIG_NAME).is_file():
        return None
    check_given(
        Path(source.folder), source.where, wanted=lambda name: name == GENERATION_CONFIG_NAME
    )
    try:
        return GenerationConfig.from_pretrained(source.folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source.where}: {GENERATION_CONFIG_NAME} in {source.folder} cannot be read: {error}"
        ) from error


def generation_file(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, str]:
    """Return the generation config in a model's folder as a file of a student that begins as it.

    Its end tokens are those of `stated_ends` and that of the tokenizer. A student that begins
    otherwise has no file.
    """
    generation = generation_config_of(source)
    if generation is None:
        return {}
    ends = listed_ends(tokenizer)
    if not ends <= listed_ends(generation):
        generation.eos_token_id = sorted(ends | stated_ends(generation, tokenizer))
    for key in ("bos_token_id", "pad_token_id"):
        if getattr(tokenizer, key) is not None:
            setattr(generation, key, getattr(tokenizer, key))
    return {GENERATION_CONFIG_NAME: generation.to_json_string()}


def stated_ends(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return the end tokens that a generation config states for the texts of a tokenizer.

    If it lacks the tokenizer's end token, the tokens that were added to the vocabulary count, and
    ordinary tokens are default numbers.
    """
    given = listed_ends(generation)
    has_end = listed_ends(tokenizer) <= given
    return given if has_end else given & {*tokenizer.added_tokens_decoder}


def listed_ends(config: Any) -> frozenset[int]:
    """Return the numbers of `eos_token_id`, which holds one number, a list of numbers, or None."""
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def check_prompt_lengths(lengths: Sequence[int], max_new_tokens: int, context: int | None) -> None:
    """Check that every prompt has tokens, and leaves room for its completion."""
    longest = None if context is None else context - max_new_tokens
    for number, length in enumerate(lengths):
        if length == 0:
            raise DataError(f"prompt {number} has no tokens; give every prompt at least one token")
        if longest is not None and length > longest:
            raise DataError(
                f"prompt {number} has {length} tokens, but a context of {context} tokens and "
                f"max_new_tokens {max_new_tokens} leave {longest} tokens for a prompt; shorten the "
                "prompts or lower max_new_tokens"
            )


@contextmanager
def without_settings(model: Any) -> Iterator[None]:
    """Let `generate` follow its arguments alone in the body, and restore the model's own settings.

    The model's own generation config would add its settings, such as a repetition penalty.
    """
    given: Any = model.generation_config
    attention: str | None = model.config._attn_implementation  # noqa: SLF001  (no public reader)
    # The attention of packed rows has neither a mask nor a cache.
    is_packed = (attention or "").startswith(VARLEN)
    model.generation_config = GenerationConfig()
    if is_packed:
        # Transformers refuses sdpa for some families, such as Gemma 2.
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")  # noqa: SLF001
    try:
        yield
    finally:
        model.generation_config = given
        if is_packed:
            model.set_attn_implementation(attention)


def _batches(lengths: Sequence[int], rows_at_once: int) -> Iterator[list[int]]:
    """Yield the numbers of the prompts that are continued at the same time.

    Prompts of similar length need little padding. The longest prompts come first: if the memory is
    too small for them, the error comes at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for first in range(0, len(order), rows_at_once):
        yield order[first : first + rows_at_once]


def _completion(ids: Sequence[int], end_tokens: frozenset[int]) -> Completion:
    for number, token in enumerate(ids):
        if token in end_tokens:
            return Completion(tuple(ids[: number + 1]), finished=True)
    return Completion(tuple(ids), finished=False)
