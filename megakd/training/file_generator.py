"""Texts that were generated elsewhere, in place of a generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megakd.contract.rollouts import Completion, Sampling
from megakd.data.rollout_store import read_rollouts, read_text, text_offsets
from megakd.engine.collectives import on_main, together
from megakd.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class FileGenerator:
    """A generator that returns texts from files of a `RolloutStore`; making it is a collective.

    A prompt may have several texts in the files; the seed chooses one of them. Only the places of
    the texts are in memory.

    Args:
        paths: the files.

    Raises:
        DataError: a file cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._places = on_main(lambda: _places(paths))

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
        keys, key = self._places["key"], _key(prompt)
        found = self._places[np.searchsorted(keys, key) : np.searchsorted(keys, key, "right")]
        place = found[seed % len(found)] if len(found) else None
        made = None if place is None else read_text(self._paths[place["file"]], place["offset"])
        if made is None or made.prompt != prompt:
            raise DataError(
                f"rollout.files: the {len(np.unique(keys))} prompts in the files do not include "
                f"the prompt of {len(prompt)} tokens that begins with {list(prompt[:8])}; use "
                "files of a run with the same data and tokenizer and rollout.keep_texts, or remove "
                "rollout.files"
            )
        text = made.completion
        ids = text.ids[: sampling.max_new_tokens]
        return Completion(ids, finished=text.finished and len(ids) == len(text.ids))


def _places(paths: Sequence[Path]) -> NDArray[np.void]:
    """Return the places of all texts, by the key of the prompt, else in the order of the files."""
    found = [
        (_key(rollout.prompt), number, offset)
        for number, path in enumerate(paths)
        for rollout, offset in zip(read_rollouts(path), text_offsets(path), strict=True)
    ]
    places = np.array(found, dtype=[("key", "u8"), ("file", "i4"), ("offset", "i8")])
    return places[np.argsort(places["key"], kind="stable")]


def _key(prompt: Sequence[int]) -> np.uint64:
    content = np.array(prompt, dtype=np.int64).tobytes()
    return np.frombuffer(hashlib.blake2b(content, digest_size=8).digest(), np.uint64)[0]
