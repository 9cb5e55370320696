"""Generation of text with a model in one of the run's own engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.contract.rollouts import TextTokens
from megakd.contract.tasks import STUDENT
from megakd.engine.collectives import together
from megakd.engine.whole_model import whole_model
from megakd.errors import DataError
from megakd.models.generation import complete, generation_config_of, listed_ends
from megakd.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from megakd.contract.rollouts import Completion, Sampling
    from megakd.engine.student import StudentEngine
    from megakd.training.inputs import RunInputs


class LocalGenerator:
    """Continues prompts with the weights that a student or a frozen teacher has at the moment.

    At ZeRO 3 each call gathers the weights once, and frees them at its end. Weights, gradients,
    random generators and the engine are the same after a call.

    Args:
        engine: the engine of the model; of a student with several learners, the first learner.
        tokens: the tokens of the texts, see `text_tokens`.
        rows_at_once: number of prompts that a rank continues at the same time.
    """

    def __init__(
        self,
        engine: StudentEngine | FrozenTeacher,
        *,
        tokens: TextTokens,
        rows_at_once: int,
    ) -> None:
        self._engine = engine
        self._tokens = tokens
        self._rows_at_once = rows_at_once

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        """Continue this rank's prompts, in order; a collective. There may be no prompts.

        Raises:
            MegakdError: the prompts of a rank or the model cannot be used; raised on every rank.
        """
        with whole_model(self._model()) as model:
            # Ranks that finish early wait here, however long the others generate.
            return together(
                lambda: complete(
                    model,
                    prompts,
                    seeds,
                    sampling,
                    tokens=self._tokens,
                    rows_at_once=self._rows_at_once,
                )
            )

    def _model(self) -> nn.Module:
        if isinstance(self._engine, FrozenTeacher):
            self._engine.evict()  # a copy of shards to the device may still be running
            return self._engine.model
        return self._engine.student


def text_tokens(inputs: RunInputs) -> TextTokens:
    """Return the tokens of the texts that the student or a teacher of a run generates.

    Raises:
        MegakdError: no token ends a text, or the generation config of the student cannot be read.
    """
    tokenizer, source = inputs.tokenizer, inputs.sources[STUDENT]
    pad = tokenizer.pad_token_id
    sizes = [one.config.vocab_size for one in inputs.sources.values()]
    return TextTokens(
        end=end_tokens_of(tokenizer, source.config, generation_config_of(source)),
        pad=pad if isinstance(pad, int) else 0,
        # No model can read a token that it does not have.
        known=min(len(tokenizer), *sizes),
    )


def end_tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    generation: GenerationConfig | None = None,
) -> frozenset[int]:
    """Return the tokens that end a text: those of the tokenizer and of both configs.

    A config may list end tokens without that of the tokenizer. They are default numbers in the
    model's config (2 in Llama's), which is then left out. In the generation config, the tokens that
    were added to the vocabulary of the tokenizer count, and ordinary tokens are default numbers.

    Args:
        tokenizer: the tokenizer of the model.
        config: the config of the model.
        generation: the generation config in the folder of the model; None: there is none.

    Raises:
        DataError: neither the tokenizer nor a config has an end token.
    """
    own = tokenizer.eos_token_id
    of_model, given = listed_ends(config), listed_ends(generation)
    found = listed_ends(tokenizer)
    found |= of_model if own is None or own in of_model else frozenset()
    found |= given if own is None or own in given else given & {*tokenizer.added_tokens_decoder}
    if not found:
        raise DataError(
            "the tokenizer has no eos_token, and the model's config has no eos_token_id: a "
            "generated text would never end; set eos_token in the folder of the tokenizer"
        )
    return found
