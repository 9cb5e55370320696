"""Table of the dimensions of weights that belong to prunable units.

Slicing a forward, sorting by importance, cutting, scoring weights and counting parameters all read
this table, so that they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from megakd.contract.results import ParameterCounts
from megakd.contract.views import Axes, Maker, View
from megakd.engine.sharding import full_shape
from megakd.errors import ModelError
from megakd.models.architectures import Architecture
from megakd.models.structure import architecture_of
from megakd.models.unit_axes import WIDTH, axes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weight_axes(model: PreTrainedModel) -> Mapping[str, Axes]:
    """Return the axes of all parameters that contain prunable units, by name on the model.

    The result is empty for a family that cannot be cut.
    """
    architecture = architecture_of(model.config)
    if architecture.why_uncut(model.config) is not None:
        return {}
    return axes_of(model, architecture.found_units(model.config))


def unit_makers(model: PreTrainedModel) -> dict[str, Maker]:
    """Return the matrices of the layers and embeddings whose outputs are units, by name.

    The columns of the hidden states are made by the embeddings and by the outputs of attentions
    and feed-forwards, heads by queries, keys and values, neurons by the inputs of feed-forwards.
    """
    found, table = architecture_of(model.config).found_units(model.config), weight_axes(model)
    paths = {
        f"{owner}.{path}"
        for _, owner, units in (*found.of("heads"), *found.of("neurons"))
        for path in (*units.makers, units.output)
    }
    makers: dict[str, Maker] = {}
    for path, module in model.named_modules():
        name, is_embedding = f"{path}.weight", isinstance(module, nn.Embedding)
        # ELECTRA's embeddings may be narrower than the hidden states that a matrix makes of them.
        is_raised = isinstance(module, nn.Linear) and table.get(name) == (WIDTH, None)
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        # A weight without elements, in a layer without heads or neurons, is no parameter.
        is_maker = is_embedding or is_raised or path in paths
        if name not in table or weight is None or not is_maker:
            continue
        dimension = 1 if is_embedding or not isinstance(module, nn.Linear) else 0
        axis, inputs = table[name][dimension], table[name][1 - dimension]
        if axis is not None:
            rows, columns = full_shape(weight)
            makers[name] = Maker(axis, inputs, dimension, (rows, columns))
    return makers


def output_modules(model: PreTrainedModel, architecture: Architecture) -> set[str]:
    """Return the modules whose outputs are classes or tokens: the last module of each head."""
    heads = [architecture.head]
    last = {}
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            last |= {head: path for head in heads if f"{path}.".startswith(f"{head}.")}
    return set(last.values())


def check_view(view: View, whole: View) -> None:
    """Raise if a model with these units (see `Architecture.prunable`) has no such sub-network."""
    for kind, wanted, there in (
        ("heads", view.heads, whole.heads),
        ("neurons", view.neurons, whole.neurons),
    ):
        if len(wanted) != len(there):
            raise ModelError(
                f"the view lists {kind} for {len(wanted)} layers, and the model has {len(there)} "
                "layers"
            )
        for number, (kept, count) in enumerate(zip(wanted, there, strict=True)):
            if not 0 <= kept <= count:
                raise ModelError(
                    f"the view keeps {kept} {kind} of layer {number + 1}, which has {count}"
                )
    if view.width is not None and whole.width is None:
        raise ModelError(
            f"the view keeps a width of {view.width}, and the width of this model cannot be cut: "
            "only some families lose columns of hidden states, see docs/families.md"
        )
    if view.width is not None and not 0 < view.width <= (whole.width or 0):
        raise ModelError(
            f"the view keeps a width of {view.width}, and the model has a width of {whole.width}"
        )
    columns = whole.head_width or 0
    if view.head_width is not None and not 0 < view.head_width <= columns:
        there = f"the heads have {columns} columns" if columns else "they cannot be cut one by one"
        raise ModelError(f"the view keeps {view.head_width} columns of every head, and {there}")


def weights_inside(model: Any) -> set[str]:
    """Return the names of the weights of the backbone but those of embeddings and poolers."""
    architecture = architecture_of(model.config)
    layers = tuple(f"{path}." for path in architecture.layer_paths(model.config))
    others = (f"{architecture.backbone}.{architecture.embeddings}", *architecture.renewed)
    outside = tuple(f"{path}." for path in others)
    return {
        full
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if (full := f"{path}.{name}").startswith(f"{architecture.backbone}.")
        and (
            full.startswith(layers)
            or not (isinstance(module, nn.Embedding) or full.startswith(outside))
        )
    }


def parameter_counts(model: Any) -> ParameterCounts:
    """Count the weights of a model, sharded or not; tied weights count once."""
    inside, sizes = weights_inside(model), dict[str, int]()
    for name, weight in model.named_parameters():
        sizes[name] = full_shape(weight).numel()
    return ParameterCounts(sum(sizes.values()), sum(sizes[n] for n in inside & sizes.keys()))
