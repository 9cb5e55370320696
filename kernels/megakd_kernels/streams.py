"""Streams of a loss over chunks: matrix products on one, row kernels on the same or on another.

On two streams, the row kernel of a chunk, which waits for memory, runs while the product of the
next chunk computes. The logits then need two sets of buffers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

ENVIRONMENT_VARIABLE = "MEGAKD_ROW_STREAMS"


class Lanes(Protocol):
    """Order of products and row kernels.

    copies: number of sets of buffers. turn: the set of the current chunk.
    """

    copies: int
    turn: int

    def begin(self) -> int:
        """Return the set of buffers of the next chunk, which nothing uses any more."""
        ...

    def rows(self) -> AbstractContextManager[object]:
        """Return a context in which the row kernel of the chunk is launched."""
        ...

    def join(self) -> None:
        """Let later products see the results of all row kernels."""
        ...


class OneLane:
    """Products and row kernels by turns."""

    copies = 1
    turn = 0

    def begin(self) -> int:
        """Return 0."""
        return 0

    def rows(self) -> AbstractContextManager[object]:
        """Return a context without effect."""
        return nullcontext()

    def join(self) -> None:
        """Do nothing: one stream keeps the order of its launches."""


class TwoLanes:
    """Products on one stream, row kernels on another.

    Tensors that a row kernel allocates belong to the stream of the rows. The loss keeps these
    tensors until its last product has seen them, and the rows of the next loss wait for that
    product, so that no memory is reused early.
    """

    copies = 2

    def __init__(self, products: Any, rows: Any, use: Any = torch.cuda.stream) -> None:
        self._products, self._rows, self._use = products, rows, use
        self._done: list[Any] = [None, None]
        self.turn = 1

    def begin(self) -> int:
        """Return the other set of buffers, after its last row kernel."""
        self.turn = 1 - self.turn
        if self._done[self.turn] is not None:
            self._products.wait_event(self._done[self.turn])
        return self.turn

    @contextmanager
    def rows(self) -> Iterator[None]:
        """Launch on the stream of the rows, after the products launched so far."""
        self._rows.wait_event(self._products.record_event())
        with self._use(self._rows):
            yield
        self._done[self.turn] = self._rows.record_event()

    def join(self) -> None:
        """Let the products wait for both sets of buffers."""
        for done in self._done:
            if done is not None:
                self._products.wait_event(done)


def lanes_on(device: torch.device, implementation: str) -> Lanes:
    """Return two lanes for Triton on a GPU if MEGAKD_ROW_STREAMS is 2, else one lane.

    One lane is the default until a GPU has shown that two are faster.
    """
    wants_two = os.environ.get(ENVIRONMENT_VARIABLE) == "2"
    if not wants_two or device.type != "cuda" or implementation != "triton":
        return OneLane()
    return TwoLanes(torch.cuda.current_stream(device), _side_stream(device))


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
