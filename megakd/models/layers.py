"""Models made of some layers of a stored model; no weight is read or copied for this."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from megakd.contract.views import View, evenly_spaced, most_important
from megakd.errors import ModelError
from megakd.models.architectures import (
    HEAD_COLUMNS,
    HEAD_COUNTS,
    NEURON_COUNTS,
    Architecture,
    architecture_of,
)
from megakd.models.source import ModelSource

T = TypeVar("T")
_PER_LAYER = (HEAD_COUNTS, NEURON_COUNTS, HEAD_COLUMNS, "layer_types")
"""Config keys that list a value per layer, followed by values for parts outside the layers."""
_OF_ALL_LAYERS = "relative_attention_bias"
"""T5's position bias, which is always stored in the first layer."""


def with_layers(
    source: ModelSource,
    wanted: int | Sequence[int],
    *,
    where: str,
    scores: Sequence[float] | None = None,
) -> ModelSource:
    """Return the model with fewer layers, in the given order; embeddings and head stay.

    Args:
        wanted: numbers of layers from 1, or the count of layers.
        scores: importance of every layer, by which a count of layers is chosen; None: the first
            layer, the last layer, and evenly spaced layers between them.
    """
    architecture = source.architecture
    count = architecture.number_of_layers(source.config)
    numbers = _numbers(wanted, count, where, scores)
    renumber = renumbering(architecture, numbers)
    names = {name: renumber(name) for name in source.stored}
    return dataclasses.replace(
        source,
        config=config_with_layers(source.config, architecture, numbers),
        stored={new: source.stored[name] for name, new in names.items() if new is not None},
        layers=numbers,
    )


def _numbers(
    wanted: int | Sequence[int], count: int, where: str, scores: Sequence[float] | None
) -> tuple[int, ...]:
    if isinstance(wanted, int) and wanted <= count:
        return evenly_spaced(count, wanted) if scores is None else most_important(scores, wanted)
    if isinstance(wanted, int):
        raise ModelError(
            f"{where}: must be at most {count}, the number of layers of the model (got {wanted})"
        )
    beyond = [number for number in wanted if number > count]
    if beyond:
        raise ModelError(
            f"{where}: layer {beyond[0]} does not exist; the model has the layers 1 to {count}"
        )
    return tuple(wanted)


@contextmanager
def left_out(model: nn.Module, layer: int) -> Iterator[None]:
    """Run a model without one layer, counted from 1, inside the context.

    The layer still computes, so that ZeRO 3 sees the same modules in the same order.
    """
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    block = architecture_of(config).block_of(model, layer)
    hook = block.register_forward_hook(passed_by, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def passed_by(_: nn.Module, given: Sequence[Any], named: dict[str, Any], output: Any) -> Any:
    """Let a layer return the hidden states that it was given, as a hook."""
    hidden = given[0] if given else named["hidden_states"]
    if isinstance(output, Tensor):
        return PassedBy.apply(hidden, output)
    return (PassedBy.apply(hidden, output[0]), *output[1:])


class PassedBy(torch.autograd.Function):
    """The input of a layer in place of its output; the weights of the layer get gradients of zero.

    Without a gradient, ZeRO 3 would see other modules in the backward than in the forward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.zeros_like(gradients[0])


def config_with_layers(
    config: PretrainedConfig, architecture: Architecture, numbers: Sequence[int]
) -> PretrainedConfig:
    """Return a copy of a config with some of its layers, counted from 1, in the given order."""
    fewer: Any = copy.deepcopy(config)
    count = architecture.number_of_layers(config)
    moved = any(number != place for place, number in enumerate(numbers, start=1))
    if moved and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError(
            "scale_attn_by_inverse_layer_idx: the model divides the attention scores of a layer by "
            "the layer's number, which changes if an earlier layer is left out; keep the first "
            "layers, or all of them"
        )
    for key in _PER_LAYER:
        listed = getattr(config, key, None)
        if listed:
            setattr(fewer, key, [*(listed[n - 1] for n in numbers), *listed[count:]])
    setattr(fewer, architecture.layers, len(numbers))
    return fewer


def renumbering(architecture: Architecture, numbers: Sequence[int]) -> Callable[[str], str | None]:
    """Return a function from a weight's name to its name in the model with fewer layers.

    The numbers are those of the layers that stay, counted from 1, in their new order. The function
    returns None for a weight of a layer that is left out.
    """
    # A checkpoint of the bare backbone omits the name of the backbone.
    path = rf"((?:{re.escape(architecture.backbone)}\.)?{re.escape(architecture.blocks)}\.)(\d+)\."
    places = {number - 1: place for place, number in enumerate(numbers)}

    def renumber(name: str) -> str | None:
        match = re.match(path, name)
        if match is None or _OF_ALL_LAYERS in name:
            return name
        place = places.get(int(match[2]))
        return None if place is None else f"{match[1]}{place}.{name[match.end() :]}"

    return renumber


def without_layers(config: PretrainedConfig, view: View) -> tuple[PretrainedConfig, View]:
    """Return the config and the view of the layers that a view keeps; both as given if all stay."""
    if view.layers is None:
        return config, view
    architecture = architecture_of(config)
    count = architecture.number_of_layers(config)
    numbers = {*range(1, count + 1)}
    if list(view.layers) != sorted({*view.layers} & numbers) or not view.layers:
        raise ModelError(
            f"the view keeps the layers {view.layers}, and the model has the layers 1 to {count}"
        )
    units = [*zip(view.heads[:count], view.neurons[:count], strict=True)]
    for number in sorted(numbers - {*view.layers}):
        if any(units[number - 1]):
            raise ModelError(
                f"the view leaves out layer {number} and keeps (heads, neurons) "
                f"{units[number - 1]} of this layer"
            )
    heads, neurons = (
        tuple(units[number - 1] for number in view.layers) + units[count:]
        for units in (view.heads, view.neurons)
    )
    kept = view._replace(heads=heads, neurons=neurons, layers=None)
    return config_with_layers(config, architecture, view.layers), kept


def naming(config: PretrainedConfig, view: View) -> Callable[[str], str | None]:
    """Return a function from a weight's name to its name after a cut; None: it is left out."""
    if view.layers is None:
        return lambda name: name
    return renumbering(architecture_of(config), view.layers)


def renumbered(
    state: Iterable[tuple[str, T]], config: PretrainedConfig, view: View
) -> Iterator[tuple[str, T]]:
    """Yield the weights of the layers that a view keeps, with the new numbers of their layers.

    The config is that of the model before the cut.
    """
    rename = naming(config, view)
    for name, value in state:
        renamed = rename(name)
        if renamed is not None:
            yield renamed, value
