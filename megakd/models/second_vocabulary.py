"""A second vocabulary of a model: word embeddings and biases beside those it was built with.

The model stays a plain model of its class, with one more submodule. It reads the numbers of the
second vocabulary after those of its own, and predicts each target from the vocabulary that cut the
word. The output matrix is the table of embeddings, as in BERT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from megakd.data.batch import LogitWarp
from megakd.engine.sharding import full_shape, gathered, sharded_construction
from megakd.models.weights import initialize_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SECOND = "second_vocabulary"

FILE = f"{SECOND}.safetensors"
"""File of a model's folder with the weights of its second vocabulary."""


class SecondSize(NamedTuple):
    """The shape of a second vocabulary.

    offset: number of the first piece in a model's `input_ids`, the size of the first vocabulary.
    """

    pieces: int
    offset: int


class SecondVocabulary(nn.Module):
    """Embeddings of the pieces of a second vocabulary, and their output layer.

    Nothing of it decays: the steps of a run seldom read most of the pieces.
    """

    decays = False

    def __init__(self, size: SecondSize, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.offset = size.offset
        self.table = nn.Embedding(size.pieces, width, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(size.pieces, dtype=dtype))

    def forward(self, ids: Tensor, table: nn.Module) -> Tensor:
        """Return embeddings [B, T, D] of joint numbers [B, T], the second from `offset` on."""
        is_second = ids >= self.offset
        ours = self.table((ids - self.offset).clamp(min=0))
        theirs = table(ids.masked_fill(is_second, 0))
        return torch.where(is_second.unsqueeze(-1), ours, theirs)


class SecondHead:
    """The output layer of a second vocabulary; see `data.batch.Head`."""

    warp = LogitWarp()

    def __init__(self, second: SecondVocabulary) -> None:
        self._second = second

    def read(self) -> tuple[Tensor, Tensor]:
        """Return (weight [V, D], bias [V]); under ZeRO-3 only inside a module's forward."""
        return self._second.table.weight, self._second.bias

    @contextmanager
    def open(self) -> Iterator[None]:
        with gathered([self._second.table.weight, self._second.bias]):
            yield


def second_vocabulary(model: nn.Module) -> SecondVocabulary | None:
    """Return the second vocabulary of a model; None if the model has one vocabulary."""
    return getattr(model, SECOND, None)


def add_second_vocabulary(
    model: PreTrainedModel,
    size: SecondSize,
    *,
    ds: Mapping[str, Any] | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Give a model a second vocabulary with new weights; a collective under ZeRO 3.

    The bias is zero since the vocabulary was built.
    """
    second = build_second_vocabulary(model, size, ds=ds, dtype=dtype)
    drawn = [p for name, p in second.named_parameters() if name != "bias"]
    initialize_parameters(model, drawn, seed=seed)


def build_second_vocabulary(
    model: PreTrainedModel, size: SecondSize, *, ds: Mapping[str, Any] | None, dtype: torch.dtype
) -> SecondVocabulary:
    """Give a model a second vocabulary whose weights are not set, and return the vocabulary."""
    table = model.get_input_embeddings().weight
    with sharded_construction(ds, dtype):
        second = SecondVocabulary(size, full_shape(table)[1], dtype)  # type: ignore[arg-type]
    model.add_module(SECOND, second)
    return second


def without_second_vocabulary(
    state: Iterator[tuple[str, Tensor]],
) -> tuple[Iterator[tuple[str, Tensor]], Callable[[], bytes]]:
    """Split a model's state: the plain model, and the content of `FILE`.

    Returns:
        The names and tensors of the plain model, and a function that returns the weights of the
        second vocabulary in the safetensors format, to be called after the iterator has ended.
    """
    kept: dict[str, Tensor] = {}

    def plain() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state:
            if name.startswith(f"{SECOND}."):
                kept[name.removeprefix(f"{SECOND}.")] = tensor.contiguous()
            else:
                yield name, tensor

    return plain(), lambda: save(kept)
