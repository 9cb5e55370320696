"""Texts that were generated elsewhere, in place of a generator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megakd.contract.rollouts import Completion, Sampling
from megakd.data.rollout_store import read_rollouts
from megakd.engine.collectives import together
from megakd.errors import DataError


class FileGenerator:
    """A generator that returns texts from files of a `RolloutStore`.

    A prompt may have several texts in the files; the seed chooses one of them.

    Args:
        paths: the files.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._texts: dict[tuple[int, ...], list[Completion]] = {}
        for path in paths:
            for rollout in read_rollouts(path):
                self._texts.setdefault(rollout.prompt, []).append(rollout.completion)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        """Return a text for each prompt, cut to `max_new_tokens`; a collective.

        Raises:
            DataError: a prompt has no text in the files.
        """
        pairs = list(zip(prompts, seeds, strict=True))
        return together(lambda: [self._text(tuple(p), seed, sampling) for p, seed in pairs])

    def _text(self, prompt: tuple[int, ...], seed: int, sampling: Sampling) -> Completion:
        found = self._texts.get(prompt)
        if found is None:
            raise DataError(
                f"rollout.files: the {len(self._texts)} prompts in the files do not include the "
                f"prompt of {len(prompt)} tokens that begins with {list(prompt[:8])}; use files "
                "that were made with the same data and tokenizer, or remove rollout.files"
            )
        text = found[seed % len(found)]
        ids = text.ids[: sampling.max_new_tokens]
        return Completion(ids, finished=text.finished and len(ids) == len(text.ids))
