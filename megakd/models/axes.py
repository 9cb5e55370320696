"""Table of the dimensions of weights that belong to prunable units.

Slicing a forward, sorting by importance, cutting, scoring weights and counting parameters all read
this table, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megakd.contract.results import ParameterCounts
from megakd.contract.views import Axes, Axis, Columns, Cut, Kind, Maker, View
from megakd.engine.sharding import full_shape
from megakd.errors import ModelError
from megakd.models.architectures import Architecture
from megakd.models.structure import architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from megakd.models.proposed_units import Cuttable, FoundUnits, Units

WIDTH = Axis("width")
OUTSIDE_THE_ENCODER = frozenset(
    # Embeddings, poolers and heads, as Hugging Face's models name them, and the decoder of an
    # encoder T5, which reads one token per text, as a pooler does.
    """decoder embeddings embed_tokens embed_positions word_embeddings wte wpe shared
    pooler pre_classifier classifier score cls lm_head qa_outputs predictions
    generator_predictions generator_lm_head discriminator_predictions logits_proj
    vocab_transform vocab_layer_norm vocab_projector""".split()  # noqa: SIM905
)


def weight_axes(model: PreTrainedModel) -> Mapping[str, Axes]:
    """Return the axes of all parameters that contain prunable units, by name on the model.

    The result is empty for a family that cannot be cut.
    """
    architecture = architecture_of(model.config)
    if architecture.why_uncut(model.config) is not None:
        return {}
    found, width = architecture.found_units(model.config), architecture.units(model.config).width
    table = dict(_of_units(model, found, None if width is None else WIDTH))
    if width is None:
        return {name: axes for name, axes in table.items() if any(axes)}
    attentions = [f"{owner}.{units.core}." for _, owner, units in found.of("heads")]
    outputs = output_modules(model, architecture)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            # The other weights of an attention are as wide as one head (the norms of Qwen3), or
            # have a column for each original head (the positions of T5): they are never cut.
            if full not in table and not full.startswith(tuple(attentions)):
                axes = [WIDTH if size == width else None for size in full_shape(parameter)]
                if isinstance(module, nn.Embedding) or path in outputs:
                    axes[0] = None  # tokens, positions or classes, even as many as the width
                table[full] = tuple(axes)
    return {name: axes for name, axes in table.items() if any(axes)}


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


def _of_units(
    model: PreTrainedModel, found: FoundUnits, width: Axis | None
) -> Iterator[tuple[str, Axes]]:
    kinds: tuple[tuple[Kind, Cuttable], ...] = ("heads", found.heads), ("neurons", found.neurons)
    for kind, cuttable in kinds:
        for number, owner, units in found.of(kind):
            for name, (dimension, blocks) in units.parts.items():
                path, _, weight = f"{owner}.{name}".rpartition(".")
                tensor: Tensor = getattr(model.get_submodule(path), weight)  # empty: a buffer
                axes: list[Axis | None] = [width] * len(full_shape(tensor))
                if len({*blocks}) == 1:
                    columns = _columns(units, name) if cuttable.columns else None
                    axis = Axis(kind, number, blocks[0], len(blocks), columns)
                else:
                    axis = Axis(kind, number, sum(blocks), blocks=blocks)
                axes[dimension] = axis
                yield f"{owner}.{name}", tuple(axes)
            if getattr(model.get_submodule(f"{owner}.{units.output}"), "bias", None) is not None:
                yield f"{owner}.{units.output}.bias", (width,)


def _columns(units: Units, name: str) -> Columns:
    scores = tuple(f"{path}." for path in units.makers[:2])
    return "queries" if name.startswith(scores) else "values"


def cut_part(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """Return a whole weight with its units reordered, and then cut to a view.

    The part shares the memory of the weight if each dimension keeps one prefix.
    """
    for dimension, axis in enumerate(axes):
        if axis is None or (axis.length(cut.view) is None and not axis.is_listed_in(cut.order)):
            continue
        if axis.keeps_prefix(cut):
            length = (axis.length(cut.view) or 0) // axis.parts
            whole = tensor.unflatten(dimension, (axis.parts, -1)).narrow(dimension + 1, 0, length)
            tensor = whole.flatten(dimension, dimension + 1)
        else:
            rows = axis.rows(cut, tensor.shape[dimension])
            places = torch.tensor(rows, dtype=torch.long, device=tensor.device)
            tensor = tensor.index_select(dimension, places)
    return tensor


def lengths(shape: torch.Size, axes: Axes, view: View) -> tuple[int, ...]:
    """Return the shape of a weight that is cut to a view."""
    kept = [None if axis is None else axis.length(view) for axis in axes]
    return tuple(
        size if length is None else length for size, length in zip(shape, kept, strict=True)
    )


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


def parameter_counts(shapes: Iterable[tuple[str, Sequence[int]]]) -> ParameterCounts:
    """Count weights from their names and full shapes; tied weights must be listed once."""
    total = inside = 0
    for name, shape in shapes:
        count = math.prod(shape)
        total += count
        inside += 0 if OUTSIDE_THE_ENCODER.intersection(name.split(".")) else count
    return ParameterCounts(total, inside)


def named_shapes(model: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the name and full shape of each parameter, also for ZeRO-3 shards."""
    for name, parameter in model.named_parameters():
        yield name, tuple(getattr(parameter, "ds_shape", parameter.shape))
