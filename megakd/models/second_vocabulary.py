"""A second vocabulary of a masked language model: a table of embeddings and an output layer.

The model stays a plain model of its class, with one more submodule. It reads the numbers of the
second vocabulary after those of its own, and predicts each target from the vocabulary that cut the
word. The output matrix is the table of embeddings, as in BERT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from megakd.config.task import TaskConfig
from megakd.contract.batch import LogitWarp
from megakd.engine.sharding import full_shape, gathered, sharded_construction, writes_here
from megakd.models.fitting import valueless_model
from megakd.models.fresh import initialize_parameters
from megakd.models.source import ModelSource
from megakd.models.weights import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECOND = "second_vocabulary"
FILE = f"{SECOND}.safetensors"
"""File of a model's folder with the weights of its second vocabulary."""
TABLE = "table.weight"


class SecondSize(NamedTuple):
    """The shape of a second vocabulary.

    offset: number of the first piece in a model's `input_ids`, the size of the first vocabulary.
    width: columns of the table; None: those of the model's own table.
    """

    pieces: int
    offset: int
    width: int | None = None


class SecondVocabulary(nn.Module):
    """Embeddings of the pieces of a second vocabulary, and their output layer.

    A narrower table is lifted to the width of the model by an affine map (EACL 2021, stage I). The
    output matrix is then the lifted table, whose constant part changes no softmax. Nothing of it
    decays: the steps of a run seldom read most of the pieces.
    """

    decays = False

    def __init__(self, size: SecondSize, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.offset = size.offset
        narrow = size.width or width
        self.table = nn.Embedding(size.pieces, narrow, dtype=dtype)
        self.lift = nn.Linear(narrow, width, dtype=dtype) if narrow != width else None
        self.bias = nn.Parameter(torch.zeros(size.pieces, dtype=dtype))

    def forward(self, ids: Tensor, table: nn.Module) -> Tensor:
        """Return embeddings [B, T, D] of joint numbers [B, T], the second from `offset` on."""
        is_second = ids >= self.offset
        ours = self.table((ids - self.offset).clamp(min=0))
        ours = ours if self.lift is None else self.lift(ours)
        theirs = table(ids.masked_fill(is_second, 0))
        return torch.where(is_second.unsqueeze(-1), ours, theirs)

    def before_head(self, hidden: Tensor) -> Tensor:
        """Return the input of the output matrix [..., width of the table] for [..., D]."""
        return hidden if self.lift is None else hidden @ self.lift.weight


class SecondHead:
    """The output layer of a second vocabulary; see `contract.batch.Head`."""

    warp = LogitWarp()

    def __init__(self, second: SecondVocabulary) -> None:
        self._second = second

    def read(self) -> tuple[Tensor, Tensor]:
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
    """Give a model a second vocabulary with new weights; a collective under ZeRO 3."""
    second = build_second_vocabulary(model, size, ds=ds, dtype=dtype)
    drawn = [p for name, p in second.named_parameters() if name != "bias"]
    initialize_parameters(model, drawn, seed=seed)
    with gathered([second.bias], modify=True), torch.no_grad():
        if writes_here(second.bias):
            second.bias.zero_()


@torch.no_grad()
def start_from_pieces(model: PreTrainedModel, pieces: Sequence[Sequence[int]]) -> None:
    """Start a second table from the model's own table; a collective under ZeRO 3.

    The embedding of a piece is the mean of those of its tokens `pieces` in the model's vocabulary
    (Gee et al. 2022, Fast Vocabulary Transfer). A narrower table has the principal components of
    these means; the lift has their directions, and the mean of all pieces as its constant.
    """
    second = second_vocabulary(model)
    if second is None:
        raise TypeError("the model has no second vocabulary")
    table, ours = model.get_input_embeddings().weight, list(second.parameters())
    with gathered([table]), gathered(ours, modify=True):  # type: ignore[list-item]
        if not writes_here(second.table.weight):
            return
        rows = torch.stack([table[list(tokens)].float().mean(0) for tokens in pieces])  # type: ignore[index]
        if second.lift is None:
            second.table.weight.copy_(rows)
            return
        center, narrow = rows.mean(0), second.lift.in_features
        directions = torch.linalg.svd(rows - center, full_matrices=False)[2][:narrow]
        # A table that is wider than the model keeps random values in the other columns.
        count = len(directions)
        second.table.weight[:, :count].copy_((rows - center) @ directions.T)
        second.lift.weight[:, :count].copy_(directions.T)
        second.lift.bias.copy_(center)


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


def with_table(source: ModelSource, task: TaskConfig, file: Path) -> ModelSource:
    """Return a model from random weights whose table of embeddings is read from a `FILE`.

    The file has as many pieces and columns as the model's table.
    """
    empty = valueless_model(source, task, source.config)
    table = empty.get_input_embeddings().weight
    name = next(name for name, known in empty.named_parameters() if known is table)
    return replace(source, stored={name: stored_tensors(file, source.where)[TABLE]})
