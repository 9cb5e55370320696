"""Cuts that leave out whole layers of a decoder: the config and the names of what stays.

A decoder adds the output of every attention and feed-forward to the hidden states. A layer without
heads and neurons therefore passes its input on, and the model without the layer computes the same
function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.errors import ModelError
from megakd.models.architectures import architecture_of
from megakd.models.layers import config_with_layers, renumbering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import TypeVar

    from transformers import PretrainedConfig

    from megakd.contract.views import View

    T = TypeVar("T")


def without_layers(config: PretrainedConfig, view: View) -> tuple[PretrainedConfig, View]:
    """Return the config and the view of the layers that a view keeps; both as given if all stay."""
    if view.layers is None:
        return config, view
    architecture = architecture_of(config)
    _check(config, view, view.layers)
    kept = view._replace(
        heads=tuple(view.heads[number - 1] for number in view.layers),
        neurons=tuple(view.neurons[number - 1] for number in view.layers),
        layers=None,
    )
    return config_with_layers(config, architecture, view.layers), kept


def _check(config: PretrainedConfig, view: View, layers: tuple[int, ...]) -> None:
    architecture = architecture_of(config)
    count = architecture.number_of_layers(config)
    if "causal_lm" not in architecture.tasks:
        raise ModelError(
            f"the view leaves out layers, and a layer of a {config.model_type} model without heads "
            "and neurons does not pass hidden states on unchanged; use student.layers"
        )
    if list(layers) != sorted({*layers} & {*range(1, count + 1)}) or not layers:
        raise ModelError(
            f"the view keeps the layers {layers}, and the model has the layers 1 to {count}"
        )
    units = [*zip(view.heads, view.neurons, strict=True)]
    for number in sorted({*range(1, count + 1)} - {*layers}):
        if any(units[number - 1]):
            raise ModelError(
                f"the view leaves out layer {number} and keeps (heads, neurons) "
                f"{units[number - 1]} of this layer"
            )


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
