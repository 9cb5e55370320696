"""Continuation of a batch of prompts; rows that have ended leave the batch.

transformers' `generate` computes all rows until the last row has ended. Here a call of `generate`
stops as soon as enough rows have ended, and the next call continues the other rows with their part
of the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import BoolTensor, LongTensor, Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from megakd.contract.completions import Sampling, TextTokens
from megakd.models.sampling import sampling_processors

SHARE_TO_LEAVE = 0.125
"""Share of the rows of a batch that have ended when these rows leave the batch.

Leaving costs a copy of the cache of the other rows, and the start of a call."""


class _Running(NamedTuple):
    """The rows that have not ended.

    rows: numbers of the prompts.
    ids: tokens so far [B, T], with padding on the left.
    mask: 0 for the padding [B, T].
    cache: the cache of the rows as an argument of `generate`; empty before the first call.
    """

    rows: list[int]
    ids: Tensor
    mask: Tensor
    cache: dict[str, DynamicCache]


def continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    tokens: TextTokens,
) -> list[list[int]]:
    """Return the new tokens of each prompt; further tokens may follow an end token.

    There is at least one prompt, and the model's own generation config sets nothing.
    """
    running, texts = _padded(prompts, tokens.pad, model.device), {}
    length, ends = running.ids.shape[1], _tensor(tokens.end, model.device)
    while running.rows:
        output = model.generate(
            running.ids,
            attention_mask=running.mask,
            synced_gpus=False,  # the weights are whole: a rank may stop before the others
            **_settings(running, seeds, sampling, tokens, length),
            **running.cache,
        )
        new = output.sequences[:, length:]  # [B, T]
        has_ended = _has_end(new, ends) | (new.shape[1] == sampling.max_new_tokens)  # [B]
        for place in has_ended.nonzero()[:, 0].tolist():
            texts[running.rows[place]] = new[place].tolist()
        running = _others(running, output, (~has_ended).nonzero()[:, 0], model)
    return [texts[row] for row in range(len(prompts))]


class EnoughHaveEnded(StoppingCriteria):
    """Stops all rows as soon as `SHARE_TO_LEAVE` of the rows have ended."""

    def __init__(self, ends: Tensor, rows: int) -> None:
        self._ends = ends
        self._enough = rows * SHARE_TO_LEAVE
        self._has_ended = torch.zeros(rows, dtype=torch.bool, device=ends.device)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> BoolTensor:
        """Return whether to stop [B], the same for all rows, after a new token of each row."""
        del scores, kwargs
        self._has_ended |= _has_end(input_ids[:, -1:], self._ends)
        # The host reads no value here: a read would wait for the device.
        is_enough = self._has_ended.sum() >= self._enough
        return cast("BoolTensor", is_enough.expand(len(input_ids)))


def _settings(
    running: _Running,
    seeds: Sequence[int],
    sampling: Sampling,
    tokens: TextTokens,
    prompt_length: int,
) -> dict[str, Any]:
    ids = running.ids
    config = GenerationConfig(
        max_new_tokens=prompt_length + sampling.max_new_tokens - ids.shape[1],
        do_sample=False,  # the maximum of logits with noise is a sample
        use_cache=True,
        eos_token_id=sorted(tokens.end) or None,
        pad_token_id=tokens.pad,
        return_dict_in_generate=True,
    )
    noise = [seeds[row] for row in running.rows]
    enough = EnoughHaveEnded(_tensor(tokens.end, ids.device), len(running.rows))
    return {
        "generation_config": config,
        "logits_processor": sampling_processors(
            sampling, noise, prompt_length, ids.device, tokens.known
        ),
        "stopping_criteria": StoppingCriteriaList([enough]),
    }


def _padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> _Running:
    length = max(map(len, prompts))
    ids = [[*[pad] * (length - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (length - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    tensors = (torch.tensor(numbers, device=device) for numbers in (ids, mask))
    return _Running([*range(len(prompts))], *tensors, cache={})


def _tensor(ends: frozenset[int], device: torch.device) -> Tensor:
    return torch.tensor(sorted(ends), dtype=torch.long, device=device)


def _has_end(ids: Tensor, ends: Tensor) -> Tensor:
    return torch.isin(ids, ends).any(1)


def _others(running: _Running, output: Any, places: Tensor, model: Any) -> _Running:
    ids = output.sequences[places]
    mask = functional.pad(running.mask[places], (0, ids.shape[1] - running.mask.shape[1]), value=1)
    rows = [running.rows[place] for place in places.tolist()]
    return _Running(rows, ids, mask, _cache_of(model, output, places) if rows else {})


def _cache_of(model: Any, output: Any, places: Tensor) -> dict[str, DynamicCache]:
    """Return the cache of the rows at `places` as an argument of `generate`.

    There is no argument for a model with another cache, or with recurrent states alone, such as
    Mamba: the next call of `generate` reads all tokens of the rows again.
    """
    arguments = inspect.signature(type(model).forward).parameters
    # The second is the name before transformers 5.24.
    name = next((name for name in ("cache", "past_key_values") if name in arguments), "")
    cache = output.get(name)
    if type(cache) is not DynamicCache or all(cache.is_linear):
        return {}
    # `batch_select_indices` leaves the states of linear attention as they are.
    cache.reorder_cache(cast("LongTensor", places))
    return {name: cache}
