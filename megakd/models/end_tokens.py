"""The tokens that begin, pad and end texts, as a model's files state them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import (
    GenerationConfig,
)
from transformers.utils import GENERATION_CONFIG_NAME

from megakd.config.task import STUDENT
from megakd.data.tokenizers import rows_for
from megakd.errors import DataError, ModelError
from megakd.models.fitting import ModelSource
from megakd.process.seals import check_given

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


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
