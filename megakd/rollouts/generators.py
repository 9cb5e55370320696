"""The generator of texts that is a model in one of the run's own engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from megakd.contract.completions import Completion, Sampling, TextTokens
from megakd.contract.tasks import STUDENT
from megakd.data.tokenizers import rows_for
from megakd.engine.collectives import together
from megakd.engine.sharding import whole_model
from megakd.engine.student import StudentEngine
from megakd.errors import DataError
from megakd.models.generation import complete, generation_config_of, listed_ends, stated_ends
from megakd.models.source import ModelSource
from megakd.teachers.frozen import FrozenTeacher


class LocalGenerator:
    """A generator that uses the weights of an engine, `rows_at_once` prompts on a rank."""

    def __init__(
        self, engine: StudentEngine | FrozenTeacher, *, tokens: TextTokens, rows_at_once: int
    ) -> None:
        self._engine = engine
        self._complete = partial(complete, tokens=tokens, rows_at_once=rows_at_once)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        if isinstance(self._engine, FrozenTeacher):
            self._engine.evict()  # a copy of shards to the device may still be running
            module = self._engine.model
        else:
            module = self._engine.student
        with whole_model(module) as model:
            # Ranks that finish early wait here, however long the others generate.
            return together(lambda: self._complete(model, prompts, seeds, sampling))


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: Mapping[str, ModelSource]
) -> TextTokens:
    """Return the tokens of the texts that the student or a teacher of a run generates."""
    source = sources[STUDENT]
    pad = tokenizer.pad_token_id
    sizes = [one.config.vocab_size for one in sources.values()]
    return TextTokens(
        end=end_tokens_of(tokenizer, source.config, generation_config_of(source)),
        pad=pad if isinstance(pad, int) else 0,
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
