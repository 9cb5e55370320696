"""The config of a model with some of its layers."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from megakd.errors import ModelError, one_line
from megakd.models.architectures import HEAD_COLUMNS, HEAD_COUNTS, NEURON_COUNTS, Architecture

_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks")
_COUNTS_OF_DECODERS = ("decoder_layers", "encoder_layers")
"""Config keys of the number of layers; those of a decoder of an encoder-decoder come in pairs."""
_AND_MORE = (HEAD_COUNTS, NEURON_COUNTS, HEAD_COLUMNS)
"""Config keys that list a value per layer, followed by values for parts outside the layers."""
_OVER_ROOT = ("scale_depth",)
"""Config keys of a factor that the root of the number of layers divides (MiniCPM)."""
_FIRST = ("first_k_dense_replace", "num_dense_layers")
"""Config keys of the number of first layers that differ from the others."""
_NUMBERS = re.compile(r"layer|block|idx|index|indices")
"""In names of config keys that may list layers by their numbers, from 0."""
_NOT_OF_LAYERS = re.compile(r"^mtp_|token|architectures|languages|_multipliers$|_limit$|_section$")
"""In names of config keys that list something else, perhaps as many values as there are layers."""


def config_with_layers(
    config: PretrainedConfig, architecture: Architecture, numbers: Sequence[int]
) -> PretrainedConfig:
    """Return a copy of a config with some of its layers, counted from 1, in the given order.

    Every list with a value per layer is cut along, and layers that a list or a dictionary names by
    number have their new numbers.

    Raises:
        ModelError: the class of the config refuses the values.
    """
    count = architecture.number_of_layers(config)
    if [*numbers] == [*range(1, count + 1)]:
        return copy.deepcopy(config)
    values = config.to_dict()
    places = {number - 1: place for place, number in enumerate(numbers)}
    _cut_values(values, config, count, places)
    if "attention_types" in values:  # of GPT-Neo, which makes the list of layers from these
        kinds = getattr(config, "attention_layers", ())
        values["attention_types"] = [[[kinds[number]], 1] for number in places]
    for key in _AND_MORE:
        listed = getattr(config, key, None)
        if listed:
            values[key] = [*(listed[n - 1] for n in numbers), *listed[count:]]
    try:
        return type(config).from_dict(values)
    except Exception as error:  # each class checks its values in its own way
        raise ModelError(
            f"the config of a {config.model_type} model cannot have the layers {[*numbers]} alone: "
            f"{one_line(error)}"
        ) from error


def _cut_values(
    values: dict[Any, Any], config: PretrainedConfig | None, count: int, places: Mapping[int, int]
) -> None:
    # `places`: by the number of a layer that stays, from 0, its new number, in the new order.
    for key, value in values.items():
        name = str(key)
        if name in (*_COUNTS, *_COUNTS_OF_DECODERS) and value == count:
            values[key] = len(places)
        elif name in _OVER_ROOT and value is not None:
            values[key] = value * math.sqrt(len(places) / count)
        elif name in _FIRST and isinstance(value, int):
            values[key] = sum(number < value for number in places)
        elif isinstance(value, list | tuple) and not _NOT_OF_LAYERS.search(name):
            values[key] = _cut_list(name, value, count, places)
        elif isinstance(value, dict) and _is_by_number(name, value, count):
            by_number = {int(number): one for number, one in value.items()}
            stay = [number for number in places if number in by_number]
            values[key] = {places[number]: by_number[number] for number in stay}
        elif isinstance(value, dict):
            part = getattr(config, name, None)
            if not _is_another_model(part, config):
                _cut_values(value, part, count, places)


def _cut_list(name: str, value: Sequence[Any], count: int, places: Mapping[int, int]) -> list[Any]:
    numbers = [one for one in value if type(one) is int and 0 <= one < count]
    is_rising = numbers == sorted({*numbers}) and len(numbers) == len(value) > 0
    if is_rising and _NUMBERS.search(name):
        return sorted(places[number] for number in numbers if number in places)
    if len(value) == count:
        return [value[number] for number in places]
    nested = (isinstance(one, list | tuple) and len(one) == count for one in value)
    if value and all(nested):
        return [[one[number] for number in places] for one in value]
    return [*value]


def _is_by_number(name: str, value: Mapping[Any, Any], count: int) -> bool:
    return bool(value and _NUMBERS.search(name)) and all(
        str(number).isdecimal() and int(number) < count for number in value
    )


def _is_another_model(part: Any, config: PretrainedConfig | None) -> bool:
    # Whether a part of a config is the config of another model, such as one of images.
    if not isinstance(part, PretrainedConfig) or config is None:
        return False
    has_layers = any(getattr(part, key, None) is not None for key in _COUNTS)
    return has_layers and part is not config.get_text_config()
