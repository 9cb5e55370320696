"""Sampling of the next token that depends on the seed of a row, and not on the other rows.

The Gumbel-max trick: the token with the largest sum of its logit and Gumbel noise is a sample of
the softmax (Gumbel 1954; Maddison, Tarlow and Minka 2014, section 2). The noise is a function of
(seed of the row, position in the completion, token) and uses no random generator: the numbers are
those of SplitMix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megakd.contract.completions import Sampling

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_UNIFORM_BITS = 52
_BELOW_ONE = 1 - 2.0**-24
"""The largest number below 1 in fp32."""


def sampling_processors(
    sampling: Sampling,
    seeds: Sequence[int],
    prompt_length: int,
    device: torch.device,
    count: int | None = None,
) -> LogitsProcessorList:
    """Return processors of logits [B, V] after which the maximum of a row is the next token.

    Args:
        sampling: a temperature of 0 leaves the logits unchanged.
        prompt_length: tokens of the prompts, padding included.
        count: tokens from this number on are never chosen; None: all tokens may be.
    """
    processors = LogitsProcessorList([] if count is None else [FirstTokens(count)])
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(GumbelNoise(seeds, prompt_length, device))
    return processors


class FirstTokens(LogitsProcessor):
    """Excludes the tokens from `count` on."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits [B, V] with -inf from `count` on."""
        del input_ids
        places = torch.arange(scores.shape[1], device=scores.device)
        return scores.masked_fill(places >= self._count, float("-inf"))


class GumbelNoise(LogitsProcessor):
    """Adds the Gumbel noise of each row's stream to the logits."""

    def __init__(self, seeds: Sequence[int], prompt_length: int, device: torch.device) -> None:
        signed = torch.tensor([_signed(seed) for seed in seeds], dtype=torch.long, device=device)
        self._keys = _mixed_(signed + _signed(_GOLDEN))  # [B]
        self._prompt_length = prompt_length
        self._places = torch.empty(0, dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits [B, V] with noise, after the tokens `input_ids` [B, T]."""
        vocabulary = scores.shape[1]
        if len(self._places) != vocabulary:
            numbers = torch.arange(1, vocabulary + 1, device=scores.device)
            self._places = numbers * _signed(_GOLDEN)  # [V]
        position = input_ids.shape[1] - self._prompt_length
        keys = _mixed_(self._keys + _signed((position + 1) * _GOLDEN))
        return scores + _gumbel(_mixed_(keys[:, None] + self._places))


def _gumbel(bits: Tensor) -> Tensor:
    """Return fp32 Gumbel noise [B, V] from random int64 numbers, which are overwritten.

    The largest values of the noise decide. They come from numbers u near 0, where fp32 has the
    finest steps.
    """
    uniform = _shifted_(bits, 64 - _UNIFORM_BITS).float()
    uniform.add_(0.5).mul_(2.0**-_UNIFORM_BITS).clamp_(max=_BELOW_ONE)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mixed_(state: Tensor) -> Tensor:
    state.bitwise_xor_(_shifted_(state.clone(), 30)).mul_(_signed(_FIRST))
    state.bitwise_xor_(_shifted_(state.clone(), 27)).mul_(_signed(_SECOND))
    return state.bitwise_xor_(_shifted_(state.clone(), 31))


def _shifted_(state: Tensor, count: int) -> Tensor:
    """Shift unsigned 64-bit numbers to the right in place; torch repeats the sign of int64."""
    return state.bitwise_right_shift_(count).bitwise_and_((1 << (64 - count)) - 1)


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
