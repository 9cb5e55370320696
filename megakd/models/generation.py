"""Completions of prompts by a model with `generate` of transformers, and its settings.

`generate` computes all rows until the last row has ended. Here a call of `generate` stops as soon
as enough rows have ended, and the next call continues the other rows with their part of the cache.
With SmolLM2-135M on a CPU, one call for 32 rows that end at different tokens takes 1.2 times as
long.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from transformers.utils import GENERATION_CONFIG_NAME

from megakd.config.sections import Sampling
from megakd.config.task import STUDENT
from megakd.data.batch import Batch, TopK
from megakd.data.tokenizers import rows_for
from megakd.engine.sharding import evaluating
from megakd.errors import DataError, ModelError
from megakd.models.architectures import context_length
from megakd.models.fitting import ModelSource
from megakd.models.knowledge import LanguageModelHead, Needs, read_knowledge
from megakd.models.packing import VARLEN
from megakd.process.files import check_given

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENS_PER_TEXT, TRUNCATED = "rollout/tokens_per_text", "rollout/truncated"
"""Logged means over the texts of the steps since the last log: length, and share without an end."""


class TextTokens(NamedTuple):
    """The tokens of generated texts.

    end: tokens that end a text; if empty, all texts reach `max_new_tokens`.
    pad: token of the padding of prompts, which the model does not see.
    known: tokens from this number on are never generated: models have more tokens than their
        tokenizers. None: all tokens of the model.
    """

    end: frozenset[int]
    pad: int = 0
    known: int | None = None


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


def generation_config_of(source: ModelSource) -> GenerationConfig | None:
    """Return the generation config in a model's folder, which may list further end tokens."""
    if source.folder is None or not (source.folder / GENERATION_CONFIG_NAME).is_file():
        return None
    check_given(source.folder, source.where, wanted=lambda name: name == GENERATION_CONFIG_NAME)
    try:
        return GenerationConfig.from_pretrained(source.folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source.where}: {GENERATION_CONFIG_NAME} in {source.folder} cannot be read: {error}"
        ) from error


def generation_of(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None
) -> GenerationConfig:
    """Return the model's generation settings, with the tokenizer's ids if the ids differ.

    A Llama config defaults to bos 1 and eos 2. With other ids in the tokenizer, a text would never
    end.
    """
    generation = GenerationConfig.from_model_config(config)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        known: Any = getattr(generation, key)
        wanted = getattr(tokenizer, key, None)
        if wanted is not None and wanted not in (known if isinstance(known, list) else [known]):
            setattr(generation, key, wanted)
    return generation


def generation_file(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    learned: frozenset[int] = frozenset(),
) -> Mapping[str, str]:
    """Return the generation config of a student that begins as a model, as a file.

    Its end tokens are those of `stated_ends`, that of the tokenizer, and the `learned` ones, which
    end the answers of the training rows. A model without a file has the settings of its config.
    """
    generation = generation_config_of(source) or generation_of(source.config, tokenizer)
    ends = listed_ends(tokenizer) | learned
    if not ends <= listed_ends(generation):
        generation.eos_token_id = sorted(ends | stated_ends(generation, tokenizer))
    for key in ("bos_token_id", "pad_token_id"):
        if getattr(tokenizer, key) is not None:
            setattr(generation, key, getattr(tokenizer, key))
    return {GENERATION_CONFIG_NAME: generation.to_json_string()}


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: Mapping[str, ModelSource]
) -> TextTokens:
    """Return the tokens of the texts that the student or a teacher of a run generates."""
    source = sources[STUDENT]
    sizes = [one.config.vocab_size for one in sources.values()]
    return TextTokens(
        end=end_tokens_of(tokenizer, source.config, generation_config_of(source)),
        pad=getattr(tokenizer, "pad_token_id", None) or 0,
        # No model can read a token that it does not have.
        known=min(rows_for(tokenizer), *sizes),
    )


def end_tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    generation: GenerationConfig | None = None,
) -> frozenset[int]:
    """Return the tokens that end a text: those of the tokenizer and of both configs.

    A config may list end tokens without that of the tokenizer. They are default numbers in the
    model's config (2 in Llama's), which is then left out; of the generation config see
    `stated_ends`.
    """
    ends, of_model = listed_ends(tokenizer), listed_ends(config)
    ends |= of_model if ends <= of_model else frozenset()
    ends |= stated_ends(generation, tokenizer)
    if not ends:
        raise DataError(
            "the tokenizer has no eos_token, and the model's config has no eos_token_id: a "
            "generated text would never end; set eos_token in the folder of the tokenizer"
        )
    return ends


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


LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Most elements of a block of logits; a larger block reads the output matrix less often."""

_ROOM_FOR_DRAWS = 4
"""Memory of a draw over that of a choice of the largest: the cumulative sums are in fp64."""


class TokenCounts(NamedTuple):
    """Draws from a language model's next-token distribution, with replacement.

    ids: [..., n] int32 different token numbers in ascending order; -1 in unused slots, and in all
        slots if the logits are not finite.
    counts: [..., n] uint8, how often each token was drawn; 0 in unused slots.
    """

    ids: Tensor
    counts: Tensor


def most_likely(model: nn.Module, batch: Batch, count: int) -> TopK:
    """Return a language model's most likely next tokens at every position, [B, T, count].

    Under ZeRO 3, call inside a module's forward.
    """

    def read(logits: Tensor, _: slice) -> TopK:
        best, ids = logits.topk(min(count, logits.shape[1]), dim=-1)
        return TopK(ids.int(), best - logits.logsumexp(-1, keepdim=True))

    return TopK(*_of_logits(model, batch, read))


def drawn(model: nn.Module, batch: Batch, numbers: Tensor) -> TokenCounts:
    """Return draws from a language model's softmax at every position, [B, T, n].

    Under ZeRO 3, call inside a module's forward. The numbers [B, T, n] are fp64 and random in [0,
    1).
    """
    flat = numbers.flatten(0, 1)

    def read(logits: Tensor, rows: slice) -> TokenCounts:
        return count_draws(draw(logits, flat[rows]))

    return TokenCounts(*_of_logits(model, batch, read, room=_ROOM_FOR_DRAWS))


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw int64 tokens [C, n] from softmax(logits [C, V]) by inversion of the cumulative sums.

    The numbers [C, n] are fp64 and random in [0, 1). The sums are in fp64: in fp32, their rounding
    exceeds the probability of most tokens of a large vocabulary. Rows with logits that are not
    finite numbers or -inf get -1.
    """
    sums = logits.double().softmax(-1).cumsum_(-1)
    total = sums[:, -1:]
    # Rounding must not lift a place to the total: no token lies there.
    places = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))
    ids = torch.searchsorted(sums, places, right=True)
    return torch.where(total.isfinite(), ids, -1)


def count_draws(ids: Tensor) -> TokenCounts:
    """Return the different tokens of each row of draws [C, n], with their counts.

    There are at most 255 draws per row; -1 is no token.
    """
    ordered = ids.sort(-1).values
    slots = (ordered.diff(dim=-1) != 0).cumsum(-1)
    slots = functional.pad(slots, (1, 0))  # the first draw has slot 0
    is_token = (ordered >= 0).to(torch.uint8)
    return TokenCounts(
        torch.full_like(ordered, -1).scatter_(-1, slots, ordered).int(),
        torch.zeros_like(is_token).scatter_add_(-1, slots, is_token),
    )


def _of_logits(
    model: nn.Module,
    batch: Batch,
    read: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    *,
    room: int = 1,
) -> Iterator[Tensor]:
    knowledge = read_knowledge(model, batch, Needs())
    if knowledge.hidden is None:
        raise TypeError("a language model was read without its hidden states")
    head = LanguageModelHead(model)
    hidden, answers = knowledge.hidden.flatten(0, -2), []
    most = LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cpu"]) // room
    with head.open():
        weight, bias = head.read()
        step = max(1, most // len(weight))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = head.warp(functional.linear(hidden[rows], weight, bias).float())
            answers.append(read(logits, rows))
    shape = knowledge.hidden.shape[:-1]
    return (torch.cat(parts).unflatten(0, shape) for parts in zip(*answers, strict=True))
