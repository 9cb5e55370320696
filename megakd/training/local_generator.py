"""Generation of text with a model in one of the run's own engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megakd.engine.collectives import together
from megakd.engine.whole_model import whole_model
from megakd.errors import DataError
from megakd.models.generation import complete
from megakd.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from megakd.contract.rollouts import Completion, Sampling, TextTokens
    from megakd.engine.student import StudentEngine


class LocalGenerator:
    """Continues prompts with the weights that a student or a frozen teacher has at the moment.

    At ZeRO 3 each call gathers the weights once, and frees them at its end. Weights, gradients,
    random generators and the engine are the same after a call.

    Args:
        engine: the engine of the model; of a student with several learners, the first learner.
        tokens: the tokens of the texts, see `end_tokens_of`.
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


def end_tokens_of(
    tokenizer: PreTrainedTokenizerBase, *configs: PretrainedConfig | GenerationConfig | None
) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the configs.

    A config is left out if it has end tokens, but not the tokenizer's: configs have default
    numbers (2 in Llama's), which are ordinary tokens of another tokenizer.

    Args:
        tokenizer: the tokenizer of the model.
        configs: configs of the model and of its generation; each may list several end tokens.

    Raises:
        DataError: neither the tokenizer nor a config has an end token.
    """
    own = tokenizer.eos_token_id
    listed = [_as_set(config.eos_token_id) for config in configs if config is not None]
    found = _as_set(own).union(*(ids for ids in listed if own is None or own in ids))
    if not found:
        raise DataError(
            "the tokenizer has no eos_token, and the model's config has no eos_token_id: a "
            "generated text would never end; set eos_token in the folder of the tokenizer"
        )
    return found


def _as_set(ids: Any) -> frozenset[int]:
    """Return the numbers of a key that holds one number, a list of numbers, or None."""
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
