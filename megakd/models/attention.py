"""Queries, keys and values of a model's layers, recorded by hooks during a forward.

In every implementation (eager, sdpa, flash), the inputs of the attention come from modules:
projections, or norms after the projections (Qwen3). Hooks on these modules record the vectors.
The hooks exist for one forward only. They run after the hooks of DeepSpeed, whose outputs carry the
operation that gathers a sharded weight again in the backward, and they are removed before gradient
checkpointing repeats the forward. They compute nothing, because a repeated forward must save the
same tensors as the first forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megakd.contract.batch import AttentionVectors
from megakd.engine.sharding import is_sharded
from megakd.models.architecture import RotaryForm
from megakd.models.architectures import architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AttentionNotes:
    """Recorder of the attention vectors of one forward."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self._architecture = architecture_of(model.config)
        self._config = model.config
        self._sources = {i: self._architecture.vectors_of(model, i) for i in layers}
        self._blocks = {i: self._architecture.block_of(model, i) for i in layers}
        attentions = self._architecture.attentions(model.config)
        self._cores = {i: model.get_submodule(attentions[i - 1].core) for i in layers}
        self._rotary = self._architecture.rotary_of(model) if layers else None
        self._seen: dict[object, Any] = {}

    @contextmanager
    def taking(self) -> Iterator[None]:
        modules = list(dict.fromkeys(m for parts in self._sources.values() for m in parts))
        for block in self._blocks.values():
            # See `BackThroughLayer`.
            is_repeated = getattr(block, "gradient_checkpointing", False) and block.training
            if is_repeated and is_sharded(block):
                modules.append(block)
        if self._rotary is not None:
            modules.append(self._rotary)
        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_hook(self._note).remove)
            yield

    def _note(self, module: nn.Module, inputs: Sequence[Any], output: Any) -> None:
        # A rotary module may run once for each type of layers, which its last input names.
        kind = inputs[-1] if inputs and isinstance(inputs[-1], str) else None
        self._seen[module if kind is None else (module, kind)] = output

    def vectors(self) -> tuple[AttentionVectors | None, ...]:
        """Return the vectors by layer, 0 being the embedding; None for a layer not requested."""
        count = self._architecture.number_of_layers(self._config)
        return tuple(self._of_layer(layer) for layer in range(count + 1))

    def _of_layer(self, layer: int) -> AttentionVectors | None:
        if layer not in self._sources:
            return None
        # One module may produce all three, concatenated.
        seen = [self._seen[module] for module in dict.fromkeys(self._sources[layer])]
        if self._blocks[layer] in self._seen:
            output = self._seen[self._blocks[layer]]
            output = output if isinstance(output, Tensor) else output[0]
            seen = list(BackThroughLayer.apply(output, *seen))
        heads = self._architecture.heads(self._config)
        shared = heads.queries // heads.keys
        parts = _split(seen[0], shared) if self._architecture.attention.is_fused else seen
        if self._architecture.norms_by_head:
            # An attention without heads norms [B, T, 0, width], see `modeling_cut`.
            normed = (part.transpose(1, 2) if part.shape[2] else part for part in parts[:2])
            parts = [*normed, parts[2]]
        core = self._cores[layer]
        # An attention that runs as a cut of itself has narrower heads than its config says.
        width = getattr(core, "attention_head_size", heads.width)
        queries = _side_by_side(parts[0], width * shared)
        keys, values = (_side_by_side(part, width) for part in parts[1:])
        if self._rotary is not None:
            # The cosines and sines of a layer may be those of its type.
            kinds = getattr(self._config, "layer_types", None)
            of_kind = (self._rotary, kinds[layer - 1] if kinds else None)
            turns = self._seen[of_kind if of_kind in self._seen else self._rotary]
            form = self._architecture.rotary_form
            queries, keys = (turned(part, turns, width, form) for part in (queries, keys))
        scale = getattr(core, "scaling", width**-0.5)
        return AttentionVectors(queries, keys, values, width, float(scale))


def _split(joint: Tensor, shared: int) -> Sequence[Tensor]:
    unit = joint.shape[-1] // (shared + 2)
    return joint.split((shared * unit, unit, unit), dim=-1)


def _side_by_side(vectors: Tensor, unit: int) -> Tensor:
    """Return [B, T, heads * width]; without heads, return `unit` zeros per token.

    Zeros relate all tokens equally, which is correct for an attention without heads.
    """
    flat = vectors.flatten(2)  # norms of single heads add a dimension for the heads
    return flat if flat.shape[-1] else nn.functional.pad(flat, (0, unit))


class BackThroughLayer(torch.autograd.Function):
    """Identity of vectors that also gives a gradient of zero to the layer's output.

    This is for a layer that gradient checkpointing repeats in the backward and ZeRO 3 shards, if a
    loss may reach only the vectors. The repetition starts when the backward first needs a tensor of
    the layer, and then releases all gathered weights except those of the last module. The backward
    must therefore need the layer's end first. Otherwise a projection loses its weight while in use.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors; `output` is the output of the layer."""
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.device = output.shape, output.dtype, output.device
        return tuple(vector.view_as(vector) for vector in vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return zeros for the output, and the gradients of the vectors unchanged."""
        return torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device), *gradients


def turned(
    vectors: Tensor, turns: tuple[Tensor, Tensor], width: int, form: RotaryForm = "halves"
) -> Tensor:
    """Rotate heads by their positions (Su et al. 2021).

    Args:
        vectors: [B, T, heads * width].
        turns: cosines and sines, [1 or B, T, turned columns] each, or a half for `half_width`. The
            columns of a head after the turned columns do not change.
        form: the pairs of columns, see `Architecture.rotary_form`.
    """
    cosines, sines = (turn[:, :, None] for turn in turns)  # [B, T, 1, turned columns]
    if form == "half_width":
        cosines, sines = (torch.cat((turn, turn), dim=-1) for turn in (cosines, sines))
    heads = vectors.unflatten(-1, (-1, width))  # [B, T, heads, width]
    moving, rest = heads.tensor_split((cosines.shape[-1],), dim=-1)
    first, second = moving.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return torch.cat((moving * cosines + swapped * sines, rest), dim=-1).flatten(2)
