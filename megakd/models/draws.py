"""Tokens drawn from a model's distribution, and its most likely ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megakd.data.batch import Batch, TopK
from megakd.models.outputs import LanguageModelHead, Needs, read_outputs

if TYPE_CHECKING:
    pass


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
    outputs = read_outputs(model, batch, Needs())
    if outputs.hidden is None:
        raise TypeError("a language model was read without its hidden states")
    head = LanguageModelHead(model)
    hidden, answers = outputs.hidden.flatten(0, -2), []
    most = LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cpu"]) // room
    with head.open():
        weight, bias = head.read()
        step = max(1, most // len(weight))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = head.warp(functional.linear(hidden[rows], weight, bias).float())
            answers.append(read(logits, rows))
    shape = outputs.hidden.shape[:-1]
    return (torch.cat(parts).unflatten(0, shape) for parts in zip(*answers, strict=True))
