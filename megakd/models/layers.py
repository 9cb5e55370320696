"""Models made of some layers of a stored model; no weight is read or copied for this."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import TYPE_CHECKING

from megakd.errors import ModelError
from megakd.models.architectures import HEAD_COLUMNS, HEAD_COUNTS, NEURON_COUNTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from transformers import PretrainedConfig

    from megakd.models.architectures import Architecture
    from megakd.models.source import ModelSource
    from megakd.models.weights import StoredTensor

_PER_LAYER = (HEAD_COUNTS, NEURON_COUNTS, HEAD_COLUMNS, "layer_types")
"""Config keys that list a value per layer, followed by values for parts outside the layers."""
_OF_ALL_LAYERS = "relative_attention_bias"
"""T5's position bias, which is always stored in the first layer."""


def with_layers(source: ModelSource, wanted: int | Sequence[int], *, where: str) -> ModelSource:
    """Return the model with fewer layers, in the given order; embeddings and head stay.

    Args:
        source: a stored model, or the shape of one.
        wanted: numbers of layers from 1, or the count of layers, spread evenly: i of n is layer
            round(i * L / n), so that the last layer stays.
        where: the key of the run config that sets the layers.

    Raises:
        ModelError: the model has no such layer.
    """
    architecture = source.architecture
    count = architecture.number_of_layers(source.config)
    numbers = _numbers(wanted, count, where)
    return dataclasses.replace(
        source,
        config=config_with_layers(source.config, architecture, numbers),
        stored=_renamed(source.stored, architecture, numbers),
        layers=numbers,
    )


def _numbers(wanted: int | Sequence[int], count: int, where: str) -> tuple[int, ...]:
    many = wanted if isinstance(wanted, int) else len(wanted)
    if isinstance(wanted, int) and many <= count:
        return tuple(round(index * count / many) for index in range(1, many + 1))
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


def _renamed(
    stored: Mapping[str, StoredTensor], architecture: Architecture, numbers: Sequence[int]
) -> dict[str, StoredTensor]:
    """Return the remaining tensors, with the new numbers of their layers in their names."""
    renumber = renumbering(architecture, numbers)
    names = {name: renumber(name) for name in stored}
    return {new: stored[name] for name, new in names.items() if new is not None}


def renumbering(architecture: Architecture, numbers: Sequence[int]) -> Callable[[str], str | None]:
    """Return a function from a weight's name to its name in the model with fewer layers.

    The function returns None for a weight of a layer that is left out.

    Args:
        architecture: the family of the model.
        numbers: the layers that stay, counted from 1, in their new order.
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
