"""Neurons and heads that the maps of a layer propose, and the dimensions that they lie along."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from megakd.engine.sharding import full_shape
from megakd.models.views import Axes, Axis, Columns, Cut, Kind, View

Blocks = tuple[int, ...]
"""Rows of one unit in each of the blocks that lie one after the other along a dimension."""

Parts = Mapping[str, tuple[int, Blocks]]
"""Names of weights on their layer, with the dimension along which their units lie."""


class Units(NamedTuple):
    """Units of one layer: key-value groups of its attention, or neurons of its feed-forward.

    total: number of units; heads that share keys are one unit.
    makers: paths on the layer of the maps that make the units.
    output: path on the layer of the map that takes them.
    core: path on the layer of the module around the maps.
    width: rows of a key; 1 for neurons.
    form: name of this reading of the weights, of several.
    """

    total: int
    makers: tuple[str, ...]
    output: str
    core: str
    width: int
    parts: Parts
    form: str

    def fewer(self, count: int, width: int) -> Units:
        """Return the units of a layer that keeps some, whose heads keep some of their columns."""
        parts = {
            name: (dimension, tuple(size * width // self.width for size in blocks))
            for name, (dimension, blocks) in self.parts.items()
        }
        return self._replace(total=count, width=width, parts=parts)


def are_of_maps(layers: Iterable[Units | None]) -> bool:
    """Return whether no weight outside of the maps of any layer has rows of its units."""
    return all(
        {name.rpartition(".")[0] for name in units.parts} == {*units.makers, units.output}
        for units in layers
        if units is not None
    )


class Cuttable(NamedTuple):
    """The units of one kind that a model can lose.

    layers: by layer; None: the layer has no such units, or they cannot go.
    keys: of the config, whose numbers shrink with the units; none: no config states fewer.
    stated: units of a layer that these keys state; None: as many as there are.
    head_width: key of the config that then states the width of heads; None: none has to.
    layers_run_narrow: the modules between the maps take fewer units as they are; else zeros.
    can_lose_all: a layer of the class that is stored with a model can lose them all.
    can_lose_columns: the columns of a head can be cut one by one; rotary positions pair columns.
    why_fixed: reason why no units can go; None: some can.
    """

    layers: tuple[Units | None, ...] = ()
    keys: tuple[str, ...] = ()
    stated: int | None = None
    head_width: str | None = None
    layers_run_narrow: bool = False
    can_lose_all: bool = False
    can_lose_columns: bool = False
    why_fixed: str | None = None

    def fewer(self, counts: Sequence[int], width: int | None = None) -> Cuttable:
        """Return the units of layers that keep some, see `Units.fewer`; None: whole heads."""
        pairs = zip(self.layers, counts, strict=True)
        return self._replace(layers=tuple(u and u.fewer(n, width or u.width) for u, n in pairs))

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(0 if units is None else units.total for units in self.layers)


class FoundUnits(NamedTuple):
    """What can be cut out of a model.

    blocks: path on the model of the list of layers.
    more: paths of the owners of units outside of the layers, by kind; counted last.
    width: dimensions of weights that are as long as hidden states are wide, by their names on the
        model, see `starred`.
    stating_width: keys that also state the width of heads where the config states another width of
        hidden states; None: it does so only where all heads together are as wide.
    rigid: reason why hidden states cannot lose columns; None: they can.
    """

    heads: Cuttable
    neurons: Cuttable
    blocks: str
    more: Mapping[Kind, tuple[str, ...]] = {}
    width: Mapping[str, tuple[int, ...]] = {}
    stating_width: tuple[str, ...] | None = None
    rigid: str | None = None

    def parts_with(self, kind: Kind) -> Iterator[tuple[int, str, Units]]:
        """Yield the number, the path of the owner and the units of each part that has some."""
        layers, more = (self.heads if kind == "heads" else self.neurons).layers, self.more
        owners = [f"{self.blocks}.{n}" for n in range(len(layers) - len(more.get(kind, ())))]
        for number, owner in enumerate((*owners, *more.get(kind, ()))):
            units = layers[number]
            if units is not None:
                yield number, owner, units

    def starred(self, name: str) -> str:
        """Return the name of a weight with a star in place of the number of its layer."""
        inside, start = name.removeprefix(f"{self.blocks}."), f"{self.blocks}.*."
        return name if inside == name else start + inside.partition(".")[2]

    def as_keys(self) -> dict[str, Any]:
        """Return the units as the value of a config key, for `from_keys`."""
        kinds = {
            kind: {**of._asdict(), "layers": [one and one._asdict() for one in of.layers]}
            for kind, of in (("heads", self.heads), ("neurons", self.neurons))
        }
        others = {"stock": {}, "score_width": None}
        return json.loads(json.dumps({**self._asdict(), **kinds, **others}))

    @classmethod
    def from_keys(cls, narrow: Mapping[str, Any]) -> FoundUnits:
        return TypeAdapter(cls).validate_python({key: narrow[key] for key in cls._fields})


QUERIES = ("q", "query", "q_proj", "q_lin", "wq", "query_proj", "q_b_proj", "project_q")

KEYS = ("k", "key", "k_proj", "k_lin", "wk", "key_proj", "project_k")

VALUES = ("v", "value", "v_proj", "v_lin", "wv", "value_proj", "project_v")

LATENT = ("kv_b_proj",)

FUSED = ("qkv_proj", "qkv", "query_key_value", "c_attn", "wqkv", "in_proj", "att_proj")

OUTPUT = (
    "o", "o_proj", "out_proj", "out_lin", "wo", "dense", "c_proj", "attn_out", "attention_out",
    "output",
)  # fmt: skip

HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
"""Attributes of attentions."""

WITH_OTHERS = " and others"
"""End of the name of a reading in which other weights of an attention have rows of heads."""


def _size(part: nn.Module) -> tuple[int, int]:
    # Inputs and outputs of a map.
    rows, columns = cast("Tensor", part.weight).shape
    return (rows, columns) if isinstance(part, Conv1D) else (columns, rows)


def _maps(layer: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _parts_of(
    layer: nn.Module, makers: Mapping[str, Blocks], output: str, per_unit: int
) -> dict[str, tuple[int, Blocks]]:
    parts: dict[str, tuple[int, Blocks]] = {}
    for path, blocks in makers.items():
        part = layer.get_submodule(path)
        parts[f"{path}.weight"] = (int(isinstance(part, Conv1D)), blocks)
        if getattr(part, "bias", None) is not None:
            parts[f"{path}.bias"] = (0, blocks)
    is_plain = not isinstance(layer.get_submodule(output), Conv1D)
    parts[f"{output}.weight"] = (int(is_plain), (per_unit,))
    return parts


def _has_name(path: str, names: Sequence[str]) -> bool:
    return path.lower().removesuffix(".linear").rpartition(".")[2] in names


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def propose_neurons(layer: nn.Module, config: Any) -> list[Units]:
    """Return the readings of the feed-forward of a layer; none if it has no or several ones."""
    width = config.hidden_size
    cores = {_parent(path) for path in _maps(layer) if _has_name(path, QUERIES + FUSED)}
    sizes = {
        path: _size(part)
        for path, part in _maps(layer).items()
        if not any(core and f"{path}.".startswith(f"{core}.") for core in cores)
    }
    pairs: list[tuple[tuple[str, ...], str, int, int]] = []
    for down, (count, out) in sizes.items():
        fitting = {
            path: rows // count
            for path, (inputs, rows) in sizes.items()
            if out == inputs == width and rows in (count, 2 * count) and path != down
        }
        near = {path: n for path, n in fitting.items() if _parent(path) == _parent(down)}
        makers = near or fitting
        if makers and len({*makers.values()}) == 1:
            pairs.append((tuple(makers), down, count, next(iter(makers.values()))))
    # Square maps may be anything, and are read as a feed-forward only where nothing else is one.
    oblong = [pair for pair in pairs if pair[2] != width]
    if len(oblong) > 1:
        return []
    forms: dict[str, Callable[[int], Blocks]] = {
        "blocks": lambda joined: (1,) * joined,
        "in turns": lambda joined: (joined,),
    }
    return [
        Units(
            total=count,
            makers=makers,
            output=down,
            core=_parent(down),
            width=1,
            parts=_parts_of(layer, {path: blocks(joined) for path in makers}, down, 1),
            form=form,
        )
        for makers, down, count, joined in oblong or pairs
        for form, blocks in forms.items()
        if joined > 1 or form == "blocks"
    ]


def propose_heads(layer: nn.Module, config: Any) -> list[Units]:
    """Return the readings of the attention of a layer; none if no maps are named like one."""
    maps, queries = _maps(layer), getattr(config, "num_attention_heads", None)
    paths = _projections_of(layer, maps)
    if paths is None or not isinstance(queries, int):
        return []
    core = _parent(paths[0].removesuffix(".linear"))
    output = _output_of(layer, core, config, {*paths})
    if output is None:
        return []
    inputs = _size(maps[output])[0]
    rows = [_size(maps[path])[1] for path in paths]
    sizes = (getattr(layer.get_submodule(core), name, None) for name in HEAD_WIDTHS)
    width = next((size for size in sizes if isinstance(size, int) and size), rows[0] // queries)
    proposals: list[Units] = []
    for form, count, of_keys, blocks in _readings(rows, inputs, queries, width):
        if inputs % count or any(size < 1 for sizes in blocks for size in sizes):
            continue
        makers = dict(zip(paths, blocks, strict=True))
        parts = _parts_of(layer, makers, output, inputs // count)
        one = Units(count, tuple(makers), output, core, of_keys, parts, form)
        more = _more_parts(layer, one, queries)
        proposals.append(one)
        if more:
            proposals.append(one._replace(parts={**parts, **more}, form=form + WITH_OTHERS))
    return proposals


def _projections_of(layer: nn.Module, maps: Mapping[str, nn.Module]) -> tuple[str, ...] | None:
    """Return the maps of queries, keys and values; of queries and latent keys; or of all three."""

    def one(names: Sequence[str]) -> str | None:
        named = [path for path in maps if _has_name(path, names)]
        return named[0] if len(named) == 1 else None

    for parts in ((QUERIES, KEYS, VALUES), (QUERIES, LATENT), (FUSED,)):
        paths = [path for names in parts if (path := one(names)) is not None]
        if len(paths) == len(parts):
            return tuple(paths)
    return None


Reading = tuple[str, int, int, tuple[Blocks, ...]]
"""Name, number of units, width of keys, and for each map the blocks of its rows."""


def _readings(rows: Sequence[int], inputs: int, queries: int, width: int) -> Iterator[Reading]:
    """Yield the readings of maps with these rows: of each kind one, latent keys, or a fused map.

    Args:
        inputs: of the output map.
    """
    if len(rows) == 1:
        more = rows[0] - inputs
        count = more // (2 * width)
        if count > 0 and more % (2 * width) == 0 and queries % count == 0:
            of_queries = inputs // count
            yield "blocks", count, width, ((of_queries, width, width),)
            yield "by group", count, width, ((of_queries + 2 * width,),)
        return
    if len(rows) == 2:  # a map makes the keys of each query of a vector that all of them share
        of_queries, of_latent = (size // queries for size in rows)
        yield "latent", queries, of_queries, ((of_queries,), (of_latent,))
        return
    count = rows[1] // width
    if count and not any(size % count for size in (*rows, queries)):
        of_queries, *others = ((size // count,) for size in rows)
        yield "one", count, width, (of_queries, *others)
        if rows[0] == 2 * inputs:  # with a gate of each query behind all queries
            yield "gate behind", count, width, ((rows[0] // count // 2,) * 2, *others)


def _output_of(layer: nn.Module, core: str, config: Any, projections: set[str]) -> str | None:
    """Return the map of an attention that makes hidden states or beside it."""
    around = [core, _parent(core)] if core else [core]
    for top in around:
        named = [
            path
            for path, part in _maps(layer).items()
            if path not in projections
            and (not top or path.startswith(f"{top}."))
            and _size(part)[1] == config.hidden_size
            and _has_name(path, OUTPUT)
        ]
        if len(named) == 1:
            return named[0]
    return None


def _more_parts(layer: nn.Module, units: Units, queries: int) -> dict[str, tuple[int, Blocks]]:
    """Return other weights of an attention that have rows for each head, such as gates or sinks."""
    core, count, width = units.core, units.total, units.width
    per = queries // count
    sizes = {queries: per, queries * width: per * width, count * width: width, count: 1}
    return {
        name: (0, (sizes[weight.shape[0]],))
        for name, weight in layer.named_parameters()
        if name.startswith(f"{core}." if core else "")
        and weight.dim() in (1, 2)
        and weight.shape[0] in sizes
        and not any(name.startswith(f"{_parent(other)}.") for other in units.parts)
    }


PROPOSALS: Mapping[Kind, Callable[[nn.Module, Any], list[Units]]] = {
    "heads": propose_heads,
    "neurons": propose_neurons,
}

WIDTH = Axis("width")


def axes_of(model: nn.Module, found: FoundUnits) -> Mapping[str, Axes]:
    """Return the axes of all parameters that contain units, by name on the model."""
    table: dict[str, Axes] = {}
    named = weights_of(model)
    for name, tensor in named.items():
        dimensions, wide = range(len(full_shape(tensor))), found.width.get(found.starred(name), ())
        if wide:
            table[name] = tuple(WIDTH if n in wide else None for n in dimensions)
    for name, dimension, axis in _of_units(found):
        axes = [*table.get(name, (None,) * len(full_shape(named[name])))]
        axes[dimension] = axis
        table[name] = tuple(axes)
    return table


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by name; in a cut model, one without elements is a buffer."""
    buffers = {name: one for name, one in model.named_buffers() if not one.numel()}
    return {**dict(model.named_parameters(remove_duplicate=False)), **buffers}


def as_wide(
    model: nn.Module, found: FoundUnits, width: int, others: Collection[tuple[str, int]]
) -> dict[str, tuple[int, ...]]:
    """Return the dimensions of weights that are as long as a width, by their names with a star.

    Args:
        others: names and dimensions that are as long by chance; those of the entries of tables are.
    """
    tables = {f"{p}.weight" for p, part in model.named_modules() if isinstance(part, nn.Embedding)}
    return {
        found.starred(name): tuple(
            n
            for n, size in enumerate(full_shape(weight))
            if size == width and (name, n) not in others and not (n == 0 and name in tables)
        )
        for name, weight in weights_of(model).items()
    }


def _of_units(found: FoundUnits) -> Iterator[tuple[str, int, Axis]]:
    kinds: tuple[tuple[Kind, Cuttable], ...] = ("heads", found.heads), ("neurons", found.neurons)
    for kind, cuttable in kinds:
        for number, owner, units in found.parts_with(kind):
            for name, (dimension, blocks) in units.parts.items():
                if len({*blocks}) == 1:
                    is_score = name.startswith(tuple(f"{path}." for path in units.makers[:2]))
                    columns: Columns = "queries" if is_score else "values"
                    inside = columns if cuttable.can_lose_columns else None
                    axis = Axis(kind, number, blocks[0], len(blocks), inside)
                else:
                    axis = Axis(kind, number, sum(blocks), blocks=blocks)
                yield f"{owner}.{name}", dimension, axis


def cut_part(tensor: Tensor, axes: Axes, cut: Cut) -> Tensor:
    """Return a whole weight with its units reordered, and then cut to a view.

    The part shares the memory of the weight if each dimension keeps one prefix.
    """
    for dimension, axis in enumerate(axes):
        if axis is None or (axis.length(cut.view) is None and not axis.is_listed_in(cut.order)):
            continue
        if axis.keeps_prefix(cut) and axis.parts == 1:
            tensor = tensor.narrow(dimension, 0, axis.length(cut.view) or 0)
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
