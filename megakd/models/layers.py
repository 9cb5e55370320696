"""Models made of some layers of a stored model; no weight is read or copied for this."""

from __future__ import annotations

import copy
import dataclasses
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from megakd.contract.views import most_important
from megakd.errors import ModelError
from megakd.models.architecture import HEAD_COLUMNS, HEAD_COUNTS, NEURON_COUNTS
from megakd.models.architectures import architecture_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from torch import nn
    from transformers import PretrainedConfig

    from megakd.models.architecture import Architecture
    from megakd.models.source import ModelSource

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
        if scores is not None:
            return most_important(scores, wanted)
        gap = (count - 1) / max(1, wanted - 1)
        return tuple(1 + round(index * gap) for index in range(wanted))
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

    def passed_by(_: nn.Module, given: Sequence[Any], named: dict[str, Any], output: Any) -> Any:
        hidden = given[0] if given else named["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    config: PretrainedConfig = model.config  # type: ignore[assignment]
    block = architecture_of(config).block_of(model, layer)
    hook = block.register_forward_hook(passed_by, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def config_with_layers(
    config: PretrainedConfig, architecture: Architecture, numbers: Sequence[int]
) -> PretrainedConfig:
    """Return a copy of a config with some of its layers, counted from 1, in the given order."""
    fewer: Any = copy.deepcopy(config)
    count = architecture.number_of_layers(config)
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
