"""Completions of prompts by a model with `generate` of transformers, and its settings.

`generate` computes all rows until the last row has ended. Here a call of `generate` stops as soon
as enough rows have ended, and the next call continues the other rows with their part of the cache.
With SmolLM2-135M on a CPU, one call for 32 rows that end at different tokens takes 1.2 times as
long.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import BoolTensor, LongTensor, Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

from megakd.config.sections import Sampling
from megakd.engine.sharding import evaluating
from megakd.errors import DataError, ModelError
from megakd.models.architectures import context_length
from megakd.models.end_tokens import TextTokens
from megakd.models.packing import VARLEN

if TYPE_CHECKING:
    pass

TOKENS_PER_TEXT, TRUNCATED = "rollout/tokens_per_text", "rollout/truncated"
"""Logged means over the texts of the steps since the last log: length, and share without an end."""


class Completion(NamedTuple):
    """The continuation of one prompt.

    ids: the generated token numbers, with the end token if the completion is finished.
    finished: False if the completion reached `max_new_tokens` without an end.
    """

    ids: tuple[int, ...]
    finished: bool


class Generator(Protocol):
    """A model that continues prompts: an engine of the run, or servers while the student learns.

    The caller takes all requested texts before the next `update`, so that the weights do not change
    under a text.
    """

    def update(self, version: int) -> None:
        """Give the generator the weights of the student after `version` updates; a collective."""
        ...

    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> Callable[[], list[Completion]]:
        """Ask for a text for each prompt of this rank, with its seed; no collective.

        There may be no prompts. The returned function waits for the texts, or generates them, in
        the order of the prompts; a collective.
        """
        ...


SHARE_TO_LEAVE = 0.125
"""Share of the rows of a batch that have ended when these rows leave the batch.

Leaving costs a copy of the cache of the other rows, and the start of a call."""


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

    The random numbers of `rows_at_once` rows that are continued together depend on the seed of the
    longest prompt. The random generators, the model's settings and the mode of its modules are the
    same afterwards. Texts may contain the token of the padding.
    """
    if not isinstance(model, GenerationMixin):
        raise ModelError(
            f"{type(model).__name__} cannot generate text; use a causal language model"
        )
    generative: Any = model
    lengths = [len(prompt) for prompt in prompts]
    check_prompt_lengths(lengths, sampling.max_new_tokens, context_length(generative.config))
    completions: dict[int, Completion] = {}
    place = generative.device.type
    devices = [] if place == "cpu" else [generative.device]
    rng = torch.random.fork_rng(devices, device_type="cuda" if place == "cpu" else place)
    with torch.no_grad(), evaluating(model), without_settings(generative), rng:
        # Prompts of similar length need little padding. The longest prompts come first: if the
        # memory is too small for them, the error comes at once.
        order = sorted(range(len(prompts)), key=lambda row: -lengths[row])
        for first in range(0, len(order), rows_at_once):
            rows = order[first : first + rows_at_once]
            torch.manual_seed(seeds[rows[0]])
            texts = continued(generative, [prompts[row] for row in rows], sampling, tokens)
            for row, ids in zip(rows, texts, strict=True):
                ends = (place for place, token in enumerate(ids) if token in tokens.end)
                last = next(ends, None)
                count = len(ids) if last is None else last + 1
                completions[row] = Completion(tuple(ids[:count]), finished=last is not None)
    return [completions[row] for row in range(len(prompts))]


def continued(
    model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, tokens: TextTokens
) -> list[list[int]]:
    """Return the new tokens of each prompt; further tokens may follow an end token.

    There is at least one prompt, and the model's own generation config sets nothing.
    """
    parts = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(parts, batch_first=True, padding_value=tokens.pad, padding_side="left")
    mask = pad_sequence([*map(torch.ones_like, parts)], batch_first=True, padding_side="left")
    ids, mask = ids.to(model.device), mask.to(model.device)
    ends = torch.tensor(sorted(tokens.end), dtype=torch.long, device=model.device)
    length, rows, texts, cache = ids.shape[1], [*range(len(prompts))], {}, {}
    vocabulary = model.config.get_text_config().vocab_size
    rules: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # Without a number for `top_k`, transformers takes the 50 most likely tokens.
        rules = {"do_sample": True, "top_k": sampling.top_k or 0, "top_p": sampling.top_p}
        rules["temperature"] = float(sampling.temperature)
    config = GenerationConfig(
        **rules,
        suppress_tokens=[*range(tokens.known or vocabulary, vocabulary)] or None,
        use_cache=True,
        eos_token_id=sorted(tokens.end) or None,
        pad_token_id=tokens.pad,
        return_dict_in_generate=True,
    )
    while rows:
        config.max_new_tokens = length + sampling.max_new_tokens - ids.shape[1]
        output = model.generate(
            ids,
            attention_mask=mask,
            synced_gpus=False,  # the weights are whole: a rank may stop before the others
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([EnoughHaveEnded(ends, len(rows))]),
            **cache,
        )
        new = output.sequences[:, length:]  # [B, T]
        has_ended = torch.isin(new, ends).any(1) | (new.shape[1] == sampling.max_new_tokens)  # [B]
        for place in has_ended.nonzero()[:, 0].tolist():
            texts[rows[place]] = new[place].tolist()
        others = (~has_ended).nonzero()[:, 0]
        rows, ids = [rows[place] for place in others.tolist()], output.sequences[others]
        mask = functional.pad(mask[others], (0, ids.shape[1] - mask.shape[1]), value=1)
        cache = _cache_of(model, output, others) if rows else {}
    return [texts[row] for row in range(len(prompts))]


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


class EnoughHaveEnded(StoppingCriteria):
    """Stops all rows as soon as `SHARE_TO_LEAVE` of the rows have ended."""

    def __init__(self, ends: Tensor, rows: int) -> None:
        self._ends = ends
        self._enough = rows * SHARE_TO_LEAVE
        self._has_ended = torch.zeros(rows, dtype=torch.bool, device=ends.device)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> BoolTensor:
        """Return whether to stop [B], the same for all rows, after a new token of each row."""
        del scores, kwargs
        self._has_ended |= torch.isin(input_ids[:, -1], self._ends)
        # The host reads no value here: a read would wait for the device.
        is_enough = self._has_ended.sum() >= self._enough
        return cast("BoolTensor", is_enough.expand(len(input_ids)))
