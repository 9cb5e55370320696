"""Some layers of a stored model as a model of its own; no weight is read or copied for that."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import TYPE_CHECKING

from megakd.errors import ModelError
from megakd.models.architectures import HEAD_COLUMNS, HEAD_COUNTS, NEURON_COUNTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from transformers import PretrainedConfig

    from megakd.models.architectures import Architecture
    from megakd.models.loading import ModelSource
    from megakd.models.weights import StoredTensor

_PER_LAYER = (HEAD_COUNTS, NEURON_COUNTS, HEAD_COLUMNS, "layer_types")
"""Keys of a config that list something for every layer, those of no layer behind them."""
_OF_ALL_LAYERS = "relative_attention_bias"
"""T5 keeps it in the first layer, whichever that is."""


def with_layers(source: ModelSource, wanted: int | Sequence[int], *, where: str) -> ModelSource:
    """The model with fewer layers, in the order that is given; embeddings and head stay.

    Args:
        source: a stored model, or the shape of one.
        wanted: numbers of layers from 1, or how many of them, spread evenly: i of n is layer
            round(i * L / n), so that the last one stays.
        where: the key of the run config that says so.

    Raises:
        ModelError: the model has no such layer.
    """
    architecture = source.architecture
    count = architecture.number_of_layers(source.config)
    numbers = _numbers(wanted, count, where)
    return dataclasses.replace(
        source,
        config=_config_with(source.config, architecture, numbers),
        stored=_renamed(source.stored, architecture, numbers),
        layers=numbers,
    )


def _numbers(wanted: int | Sequence[int], count: int, where: str) -> tuple[int, ...]:
    many = wanted if isinstance(wanted, int) else len(wanted)
    if isinstance(wanted, int) and many <= count:
        return tuple(round(index * count / many) for index in range(1, many + 1))
    if isinstance(wanted, int):
        raise ModelError(f"{where}: {wanted} layers are wanted and the model has {count}")
    beyond = [number for number in wanted if number > count]
    if beyond:
        raise ModelError(f"{where}: there is no layer {beyond[0]}; the model has {count}, from 1")
    return tuple(wanted)


def _config_with(
    config: PretrainedConfig, architecture: Architecture, numbers: Sequence[int]
) -> PretrainedConfig:
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
    """What is left of the tensors, under the numbers that the layers have now."""
    # A checkpoint of the bare backbone leaves its name out.
    path = rf"((?:{re.escape(architecture.backbone)}\.)?{re.escape(architecture.blocks)}\.)(\d+)\."
    places = {number - 1: place for place, number in enumerate(numbers)}
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        match = re.match(path, name)
        if match is None or _OF_ALL_LAYERS in name:
            found[name] = tensor
        elif int(match[2]) in places:
            found[f"{match[1]}{places[int(match[2])]}.{name[match.end() :]}"] = tensor
    return found
