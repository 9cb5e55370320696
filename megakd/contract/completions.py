"""Rollouts: texts that a model generates from prompts, and the protocol of generators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

TOKENS_PER_TEXT, TRUNCATED = "rollout/tokens_per_text", "rollout/truncated"
"""Logged means over the texts of the steps since the last log: length, and share without an end."""


class Sampling(NamedTuple):
    """Settings with which a model continues a prompt.

    max_new_tokens: maximum number of tokens of a completion, the end token included.
    temperature: divisor of the logits; 0 takes the most likely token.
    top_p: sample from the smallest set of tokens with at least this probability.
    top_k: sample from this many most likely tokens; None: from all tokens.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None


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


class Rollout(NamedTuple):
    """One generated text, as it is written before the student learns from it.

    row: number of the training row whose prompt was continued.
    completion, finished: as in `Completion`.
    version: number of updates of the student that generated the text.
    seed: seed of the text.
    """

    row: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    finished: bool
    version: int
    seed: int


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
