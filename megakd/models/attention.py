"""Queries, keys and values of a model's layers, noted while its forward runs.

Whatever computes the attention (eager, sdpa, flash), the projections in front of it are modules,
as are the norms between (Qwen3), and hooks on them see the vectors. The hooks live as long as one
forward: they come after those of DeepSpeed, whose outputs carry what gathers a sharded weight
again in the backward, and they are gone when gradient checkpointing repeats the forward. They
compute nothing, for a repeated forward must save what the first one saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megakd.contract.batch import AttentionVectors
from megakd.engine.sharding import is_sharded
from megakd.models.architectures import architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AttentionNotes:
    """What the hooks of one forward have seen."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self._architecture = architecture_of(model.config)
        self._config = model.config
        self._sources = {i: self._architecture.vectors_of(model, i) for i in layers}
        self._blocks = {i: self._architecture.block_of(model, i) for i in layers}
        self._rotary = self._architecture.rotary_of(model)
        self._seen: dict[nn.Module, Any] = {}

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Keeps the vectors of the attentions that run inside."""
        modules = list(dict.fromkeys(m for parts in self._sources.values() for m in parts))
        modules += [block for block in self._blocks.values() if _is_repeated_in_shards(block)]
        modules += [] if self._rotary is None else [self._rotary]
        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_hook(self._note).remove)
            yield

    def _note(self, module: nn.Module, inputs: object, output: Any) -> None:
        del inputs
        self._seen[module] = output

    def vectors(self) -> tuple[AttentionVectors | None, ...]:
        """By layer, 0 being the embedding; None where nobody asked."""
        count = self._architecture.number_of_layers(self._config)
        return tuple(self._of_layer(layer) for layer in range(count + 1))

    def _of_layer(self, layer: int) -> AttentionVectors | None:
        if layer not in self._sources:
            return None
        # One module may give all three side by side.
        seen = [self._seen[module] for module in dict.fromkeys(self._sources[layer])]
        if self._blocks[layer] in self._seen:
            output = self._seen[self._blocks[layer]]
            output = output if isinstance(output, Tensor) else output[0]
            seen = list(BackThroughLayer.apply(output, *seen))
        parts = seen[0].chunk(3, dim=-1) if self._architecture.attention.is_fused else seen
        heads = self._architecture.heads(self._config)
        width, unit = heads.width, heads.width * (heads.queries // heads.keys)
        queries = _side_by_side(parts[0], unit)
        keys, values = (_side_by_side(part, width) for part in parts[1:])
        if self._rotary is not None:
            turns = self._seen[self._rotary]
            queries, keys = (turned(part, turns, width) for part in (queries, keys))
        return AttentionVectors(queries, keys, values, width)


def _side_by_side(vectors: Tensor, unit: int) -> Tensor:
    """[B, T, heads * width]; where none are left, as many zeros as the last unit had numbers.

    Zeros relate all tokens alike, which is what an attention without heads says of them.
    """
    flat = vectors.flatten(2)  # norms of single heads come with a dimension for them
    return flat if flat.shape[-1] else nn.functional.pad(flat, (0, unit))


class BackThroughLayer(torch.autograd.Function):
    """Vectors as they are, whose gradient comes with a gradient of zero for the layer's output.

    For a layer that gradient checkpointing repeats in the backward and ZeRO 3 shards, where a
    loss may reach the vectors alone. The repetition runs when a backward first needs something
    of the layer, and lets go of all weights it has gathered but the last module's: the layer's
    end must be the first to need something, or a projection loses its weight while in use.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """The vectors; `output` is the layer's."""
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.device = output.shape, output.dtype, output.device
        return tuple(vector.view_as(vector) for vector in vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Zeros for the output; the vectors' gradients as they come."""
        return torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device), *gradients


def _is_repeated_in_shards(block: nn.Module) -> bool:
    is_repeated = getattr(block, "gradient_checkpointing", False) and block.training
    return is_repeated and is_sharded(block)


def turned(vectors: Tensor, turns: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Heads turned by their positions (Su et al. 2021), halves of a head being the pairs.

    Args:
        vectors: [B, T, heads * width].
        turns: cosines and sines, [1 or B, T, width] each, as Llama's family computes them.
        width: of one head.
    """
    cosines, sines = (turn[:, :, None] for turn in turns)  # [B, T, 1, width]
    heads = vectors.unflatten(-1, (-1, width))  # [B, T, heads, width]
    first, second = heads.chunk(2, dim=-1)
    return (heads * cosines + torch.cat((-second, first), dim=-1) * sines).flatten(2)
