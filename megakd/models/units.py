"""Neurons and attention heads of a model, its width, and whether they can go.

The maps of a layer propose units by their shapes and names. A small copy of the model with random
weights decides: with its units in another order, and with some of them removed, by a config of the
family, it must compute what it computed before.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype
from transformers.pytorch_utils import Conv1D

from megakd.config.task import TaskType
from megakd.errors import ModelError
from megakd.models.architectures import (
    NARROW,
    ROUTES_TOKENS,
    Architecture,
    Known,
    config_with_layers,
    narrow_maps,
    stated,
)
from megakd.models.proposed_units import (
    PROPOSALS,
    WITH_OTHERS,
    Cuttable,
    FoundUnits,
    Units,
    are_of_maps,
    as_wide,
    axes_of,
    cut_part,
    lengths,
)
from megakd.models.small_copy import (
    TOKENS,
    experts_in,
    first_copy,
    logits_of,
    new_copy,
    one_thread,
    widths_of,
    without_values,
)
from megakd.models.views import Axis, Cut, Kind, UnitOrder, View

T = TypeVar("T")
KINDS: tuple[Kind, Kind] = ("heads", "neurons")


def _firsts(layers: Sequence[nn.Module]) -> list[int]:
    # For each layer, the first layer with the same modules.
    signatures = [signature_of(layer) for layer in layers]
    return [signatures.index(signature) for signature in signatures]


def in_copy(config: Any, architecture: Architecture, ask: Callable[..., T]) -> tuple[T | None, str]:
    """Return what is asked of the first small copy that runs: a config, task, blocks and layers.

    Returns:
        It, or None if no copy runs, and the reason.
    """
    (task,), blocks = architecture.tasks, f"{architecture.backbone}.{architecture.blocks}"
    layers: list[nn.Module] = [*without_values(config, task).get_submodule(blocks)]  # type: ignore[misc]
    count = max(1 + max(_firsts(layers)), min(2, len(layers)))
    try:
        fewer = config_with_layers(config, architecture, range(1, count + 1))
    except ModelError as error:  # the config asks for kinds of layers that the first ones are not
        return None, str(error)
    return first_copy(fewer, task, lambda small: ask(small, task, blocks, count))


def find_units(config: Any, architecture: Architecture, task: TaskType) -> FoundUnits:
    """Return the units that a small copy of a model can lose without another change."""
    if architecture.blocks is None or architecture.repeats or architecture.parts:
        reason = "its layers are not found"
        if architecture.blocks is not None:
            shared = "all its layers share their weights"
            reason = shared if architecture.repeats else "its lists have parts of layers"
        return FoundUnits(Cuttable(why_fixed=reason), Cuttable(why_fixed=reason), "", rigid=reason)
    narrow = narrow_maps(config)
    if narrow is not None:
        return FoundUnits.from_keys(narrow)
    if architecture.shares_bias:
        return _units_of_t5(config, architecture, task)
    blocks, empty = f"{architecture.backbone}.{architecture.blocks}", without_values(config, task)
    layers: list[nn.Module] = [*empty.get_submodule(blocks)]  # type: ignore[misc]
    firsts = _firsts(layers)
    found, failed = in_copy(config, architecture, OF_COPIES.answer)
    if found is None:
        reason = f"no small copy of it runs, which decides ({failed})"
        found = FoundUnits(
            Cuttable(why_fixed=reason), Cuttable(why_fixed=reason), blocks, rigid=reason
        )
    kinds = dict[str, Cuttable]()
    for kind, decided in zip(KINDS, (found.heads, found.neurons), strict=True):
        forms = [decided.layers[first] if decided.layers else None for first in firsts]
        units = tuple(map(partial(_as_decided, config, kind), layers, forms))
        kinds[kind] = _as_in(config, task, blocks, kind, decided._replace(layers=units))
    named = empty.named_parameters(remove_duplicate=False)
    sizes = {found.starred(name): weight.shape for name, weight in named}
    wide, rigid = {name: dims for name, dims in found.width.items() if dims}, found.rigid
    if rigid is None and not (
        sizes.keys() == found.width.keys()
        and all(sizes[name][n] == config.hidden_size for name, dims in wide.items() for n in dims)
    ):
        rigid = "its weights have other names or sizes than those of a small copy"
    return found._replace(**kinds, width={} if rigid else wide, rigid=rigid)


def _units_of_t5(config: Any, architecture: Architecture, task: TaskType) -> FoundUnits:
    """Return the units of an encoder of T5, whose config states all shapes.

    Its heads have columns of a bias that all layers share, which a small copy would not show.
    """
    empty, more = without_values(config, task), architecture.more_blocks
    layers: dict[bool, list[Units]] = {True: [], False: []}
    for path in architecture.layer_paths(config):
        for core, part in empty.get_submodule(path).named_modules():
            maps = {
                f"{core}.{name}": of
                for name, of in part.named_children()
                if isinstance(of, nn.Linear)
            }
            if not maps:
                continue
            (*makers, output), is_attention = maps, f"{core}.q" in maps
            width = architecture.heads(config).width if is_attention else 1
            parts = {f"{name}.weight": (int(name == output), (width,)) for name in maps}
            total = maps[output].in_features // width
            units = Units(total, tuple(makers), output, core, width, parts, "one")
            layers[is_attention].append(units)
    found = FoundUnits(
        Cuttable(tuple(layers[True]), layers_run_narrow=True, can_lose_all=True),
        Cuttable(tuple(layers[False]), layers_run_narrow=True, can_lose_all=True),
        f"{architecture.backbone}.{architecture.blocks}",
        {"heads": more * 2, "neurons": more},
    )
    others = {
        (f"{owner}.{name}", dimension)
        for _, owner, units in (*found.parts_with("heads"), *found.parts_with("neurons"))
        for name, (dimension, _) in units.parts.items()
    }
    others.add((f"{architecture.head}.weight", 0))
    wide = as_wide(empty, found, config.hidden_size, others)
    bias = "relative_attention_bias.weight"  # with a column for each head
    return found._replace(
        width={name: dims for name, dims in wide.items() if dims and not name.endswith(bias)}
    )


_FOUND = Known(
    find_units,
    without=("id2label", "label2id", "dtype", "_name_or_path", "architectures", "pad_token_id"),
)


def units_of(config: PretrainedConfig, architecture: Architecture) -> FoundUnits:
    """Return the units of a model."""
    return _FOUND.answer(config, architecture, architecture.tasks[0])


def _as_in(config: Any, task: TaskType, blocks: str, kind: Kind, decided: Cuttable) -> Cuttable:
    """Return the units of a model as it has them; the reason if it differs from a small copy."""
    why_fixed = decided.why_fixed
    if why_fixed is None and not any(decided.layers):
        why_fixed = f"its layers have no {kind} by shape and name, unlike those of a small copy"
    elif decided.keys and not _states_shapes(config, task, blocks, decided):
        decided = decided._replace(keys=())
        if not (decided.layers_run_narrow and are_of_maps(decided.layers)):
            why_fixed = f"its config does not state fewer {kind}, unlike that of a small copy"
    layers = decided.layers if why_fixed is None else (None,) * len(decided.layers)
    return decided._replace(layers=layers, why_fixed=why_fixed)


def _states_shapes(config: Any, task: TaskType, blocks: str, stated: Cuttable) -> bool:
    """Return whether a config of the model itself states fewer units in all layers."""
    known = [units for units in stated.layers if units is not None]
    if not known or len({units.total for units in known}) > 1:
        return False
    whole = known[0].total
    kept = next((n for n in range(whole // 2, 0, -1) if whole % n == 0), 1)
    empty = _tried(lambda: without_values(with_units(config, stated, known[0], kept), task))
    return empty is not None and all(
        empty.get_parameter(f"{blocks}.{number}.{name}").shape[dimension] == kept * sum(sizes)
        for number, units in enumerate(stated.layers)
        if units is not None
        for name, (dimension, sizes) in units.parts.items()
    )


def _as_decided(config: Any, kind: Kind, layer: nn.Module, form: Units | None) -> Units | None:
    if form is None:
        return None
    names, shapes = [*form.parts], {name: weight.shape for name, weight in layer.named_parameters()}
    if kind == "neurons":  # as many as the output takes, also of maps that are square here
        dimension, _ = form.parts[f"{form.output}.weight"]
        total = shapes[f"{form.output}.weight"][dimension]
        fits = all(shapes[n][d] == total * sum(sizes) for n, (d, sizes) in form.parts.items())
        return form._replace(total=total) if fits else None
    for units in PROPOSALS[kind](layer, config):
        if (
            units.form == form.form.removesuffix(WITH_OTHERS)
            and [*units.parts] == names[: len(units.parts)]
        ):
            parts = {n: units.parts.get(n, (0, (shapes[n][0] // units.total,))) for n in names}
            return units._replace(parts=parts, form=form.form)
    return None


def _decided_by_copy(
    small: PretrainedConfig, task: TaskType, blocks: str, count: int
) -> FoundUnits:
    copied, none = SmallCopy(small, task, blocks, count), (None,) * count
    decided = (decide(copied, kind) for kind in KINDS)
    heads, neurons = (one._replace(layers=one.layers or none) for one in decided)
    return decide_width(copied, FoundUnits(heads, neurons, blocks))


OF_COPIES = Known(_decided_by_copy, without=())


def decide(copied: SmallCopy, kind: Kind) -> Cuttable:
    """Return which units of a small copy can go, and the keys of its config that state it."""
    if kind == "neurons" and experts_in(copied.model) is not None:
        return Cuttable(why_fixed=ROUTES_TOKENS)
    readings: dict[str, dict[int, list[Units]]] = {}
    for number, layer in enumerate(copied.layers):
        proposed = PROPOSALS[kind](layer, copied.config)
        if proposed:
            readings.setdefault(signature_of(layer), {})[number] = proposed
    if not readings:
        parts = {"heads": "attention", "neurons": "feed-forward"}[kind]
        return Cuttable(why_fixed=f"no layer has the maps of one {parts} by shape and name")
    holding, failed = _holding(copied, kind, readings)
    every = {number: units for layers in holding for number, units in layers.items()}
    last = Cuttable(why_fixed=failed)
    for layers in [every, *(holding if len(holding) > 1 else ())] if holding else ():
        last = _stated(copied, kind, copied.of_layers(kind, layers))
        if last.why_fixed is None:
            return last
    return last


def _holding(
    copied: SmallCopy, kind: Kind, readings: Mapping[str, Mapping[int, list[Units]]]
) -> tuple[list[dict[int, Units]], str]:
    """Return of layers alike the reading whose units can be in any order; why others cannot."""
    holding: list[dict[int, Units]] = []
    failed = "its layers have at most one group of heads"
    for of_layers in readings.values():
        for forms in zip(*of_layers.values(), strict=False):
            layers = dict(zip(of_layers, forms, strict=True))
            if min(units.total for units in forms) < 2:
                continue
            if copied.is_unmoved(copied.of_layers(kind, layers)):
                holding.append(layers)
                break
            failed = f"another order of its {kind} changes the outputs"
    return holding, failed


def _stated(copied: SmallCopy, kind: Kind, found: FoundUnits) -> Cuttable:
    shown, cut = found.heads if kind == "heads" else found.neurons, _halved(found)
    known = [units for units in shown.layers if units is not None]
    layers_run_narrow, of_maps = (
        _tried(lambda: copied.layers_run_narrow(found, cut)),
        are_of_maps(known),
    )
    if layers_run_narrow and of_maps:
        first = copied.of_layers(kind, {shown.layers.index(known[0]): known[0]})
        none = (0,) * len(shown.layers)
        nothing = Cut(None, View(none, none))
        is_exact = kind == "neurons" or _tried(lambda: copied.is_exact_as_narrow(first, nothing))
        columns = kind == "heads" and copied.has_columns(found)
        shown = shown._replace(can_lose_all=bool(is_exact), can_lose_columns=columns)
    shown = shown._replace(layers_run_narrow=bool(layers_run_narrow))
    for keys, head_width in candidates(copied.config, kind, known[0]):
        stated = shown._replace(keys=keys, head_width=head_width)
        config = partial(with_units, copied.config, stated, known[0], known[0].total // 2)
        holds = _tried(lambda config=config: copied.is_exact(found, cut, config()))
        if holds:
            return stated
        if holds is not None:
            what = f"a model of its class without some of its {kind} computes something else"
            return Cuttable(why_fixed=what)
    if layers_run_narrow and of_maps:  # for a class that is stored with the model
        return shown
    more = ", and takes their width from that of the hidden states" if kind == "heads" else ""
    return Cuttable(why_fixed=f"no key of its config states fewer {kind} alone{more}")


def decide_width(copied: SmallCopy, found: FoundUnits) -> FoundUnits:
    """Return the units of a small copy with its weights that lose columns of hidden states."""
    readings = (found._replace(width=width) for width in copied.widths(found))
    heads, neurons = (tuple(tuple(range(n)) for n in counts) for counts in counts_of(found))
    order = UnitOrder(heads, neurons, mixed(copied.config.hidden_size))
    wide = next((one for one in readings if copied.is_unmoved(one, order)), None)
    if wide is None:
        reason = "another order of the columns of its hidden states changes the outputs"
        return found._replace(rigid=reason)
    width = copied.config.hidden_size * 5 // 8
    axes, view = axes_of(copied.model, wide), View(*counts_of(wide), width)
    shapes = {
        name: lengths(weight.shape, axes.get(name, (None,) * weight.dim()), view)
        for name, weight in copied.model.named_parameters()
    }
    queries = stated(copied.config, "num_attention_heads") or 1
    of_head = stated(copied.config, "head_dim") or copied.config.hidden_size // queries

    def is_stated(keys: Mapping[str, int]) -> bool:
        keys = {**copied.config.to_dict(), **widths_of(copied.config, width), **keys}
        empty = without_values(type(copied.config).from_dict(keys), copied.task)
        return {name: (*one.shape,) for name, one in empty.named_parameters()} == shapes

    for keys in {}, {"head_dim": of_head}:
        if _tried(partial(is_stated, keys)):
            return wide._replace(stating_width=(*keys,))
    return wide


def _tried(check: Callable[[], T]) -> T | None:
    """Return what a check returns; None: the code of the family refuses it in its own way."""
    try:
        return check()
    except Exception:  # noqa: BLE001
        return None


def with_units(
    config: Any, stated: Cuttable, units: Units, kept: int, more: Mapping[str, int] | None = None
) -> PretrainedConfig:
    """Return the config of a model that keeps some of the units of each layer, with more keys.

    Raises:
        ValueError: the config cannot state them.
    """
    whole, stored = stated.stated or units.total, config.to_dict()

    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(one) for one in value]
        if type(value) is bool:
            return False
        if value is None or _ADJUSTED in stated.keys:
            return kept
        if value * kept % whole:
            raise ValueError(f"{value} is no multiple of {whole} units")
        return value * kept // whole

    changes = {key: scaled(stored.get(key)) for key in stated.keys}
    if stated.head_width is not None:
        changes[stated.head_width] = units.width
    return type(config).from_dict({**stored, **changes, **(more or {})})


def head_keys(config: Any) -> tuple[str, ...]:
    """Return the keys by which configs of transformers state heads, and those that share keys."""
    stored, aliases = config.to_dict(), config.attribute_map
    queries, keys = (
        aliases.get(key, key) for key in ("num_attention_heads", "num_key_value_heads")
    )
    return (queries,) if stored.get(keys) is None else (queries, keys)


_SIZES_OF_OTHERS = ("vocab_size", "hidden_size", "max_position_embeddings", "block_multiple_of")
_ADJUSTED = "block_auto_adjust_ff_dim"
"""Key of LFM2, by which the number of neurons is not what `intermediate_size` says."""
_MAY_BE_NONE = re.compile(r"inner|intermediate|ffn|feed_forward|d_ff")


def candidates(
    config: Any, kind: Kind, units: Units
) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Yield keys of a config that may state the units, and the key of the width of heads."""
    stored, aliases = config.to_dict(), config.attribute_map
    others = {aliases.get(key, key) for key in _SIZES_OF_OTHERS}

    def with_values(*values: int) -> tuple[str, ...]:
        return tuple(
            key
            for key, value in stored.items()
            for listed in [value if isinstance(value, list) else [value]]
            if key not in others and listed and {*map(type, listed)} == {int}
            if all(one in values for one in listed)
        )

    if kind == "neurons":
        usual = aliases.get("intermediate_size", "intermediate_size")
        sized = with_values(units.total, 2 * units.total)
        empty = [k for k, v in stored.items() if v is None and _MAY_BE_NONE.search(k)]
        yield ((usual, _ADJUSTED) if stored.get(_ADJUSTED) else (usual,)), None
        yield from (((key,), None) for key in (*sized, *empty) if key != usual)
        yield sized, None
        return
    queries = config.num_attention_heads
    sized = tuple(k for k in with_values(queries, units.total) if re.search("head|kv|group", k))
    for head_width in (None, "head_dim"):
        yield head_keys(config), head_width
        yield sized, head_width


SAME = 1e-10
"""Largest difference of outputs, as a share of the largest output, in fp64."""


class InDouble(TorchFunctionMode):
    """Mode in which what a model computes in fp32 whatever its weights are is fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            return args[0].double()
        args = tuple(wider(value) for value in args)
        return func(*args, **{name: wider(value) for name, value in (kwargs or {}).items()})


def in_double(config: PretrainedConfig, task: TaskType) -> PreTrainedModel:
    """Return a small copy in fp64."""
    return as_double(new_copy(config, task, dtype=torch.float64, attention="eager"))


def as_double(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose buffers and experts compute in fp64 too."""
    if any(hasattr(type(part), "_apply_gate") for part in model.modules()):
        model.set_experts_implementation("eager")
    return model.double()


def outputs_of(model: PreTrainedModel) -> Tensor:
    """Return the logits [1, T, V] or [1, C] of a small copy in fp64."""
    # Convolutions in fp64 take seconds with several threads.
    with torch.no_grad(), one_thread(), local_torch_dtype(torch.float64), InDouble():
        return logits_of(model, TOKENS)


def is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether outputs are equal but for rounding."""
    return one.shape == other.shape and bool((one - other).abs().max() <= SAME * other.abs().max())


@contextmanager
def _with_values(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Let weights have other values in the body."""
    before = {weight: weight.data for weight in values}
    try:
        for weight, value in values.items():
            weight.data = value
        yield
    finally:
        for weight, value in before.items():
            weight.data = value


def counts_of(found: FoundUnits) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the numbers of heads and of neurons of each layer."""
    return found.heads.counts, found.neurons.counts


def _halved(found: FoundUnits) -> Cut:
    """Return the cut that leaves the units with odd numbers."""
    heads, neurons = (
        tuple((*range(1, n, 2), *range(0, n, 2)) for n in counts) for counts in counts_of(found)
    )
    halves = (tuple(n // 2 for n in counts) for counts in counts_of(found))
    return Cut(UnitOrder(heads, neurons), View(*halves))  # pyright: ignore[reportArgumentType]


def mixed(count: int) -> tuple[int, ...]:
    """Return the numbers below a count in another order, always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return tuple(order.tolist())


def _turned(count: int, by: int = 1) -> tuple[int, ...]:
    return tuple((place + by) % count for place in range(count))


class SmallCopy:
    """A small copy of a model that runs, with random values, and its layers."""

    def __init__(self, config: Any, task: TaskType, blocks: str, layers: int) -> None:
        self.config, self.blocks = config, blocks
        self.task: TaskType = task
        self.model = in_double(config, task)
        self.layers: Sequence[nn.Module] = [*self.model.get_submodule(blocks)]  # type: ignore[misc]
        if len(self.layers) != layers:
            raise ModelError(f"a copy with {layers} layers has {len(self.layers)}")
        self.outputs = outputs_of(self.model)
        if not self.outputs.isfinite().all():
            raise ModelError("the outputs of a small copy are not finite")

    def of_layers(self, kind: Kind, layers: Mapping[int, Units]) -> FoundUnits:
        """Return the units of some layers as all that can go."""
        none = (None,) * len(self.layers)
        units = Cuttable(tuple(layers.get(number) for number in range(len(none))))
        heads, neurons = (units if one == kind else Cuttable(none) for one in KINDS)
        return FoundUnits(heads, neurons, self.blocks)

    @contextmanager
    def as_cut(self, found: FoundUnits, cut: Cut) -> Iterator[None]:
        """Let the weights be those of a cut model in the body."""
        axes, named = axes_of(self.model, found), dict(self.model.named_parameters())
        with _with_values(
            {named[n]: cut_part(named[n].data, axes[n], cut) for n in axes.keys() & named.keys()}
        ):
            yield

    def is_unmoved(self, found: FoundUnits, order: UnitOrder | None = None) -> bool:
        """Return whether another order of the units, or this one, changes nothing."""
        heads, neurons = (tuple(map(_turned, counts)) for counts in counts_of(found))
        order = order or UnitOrder(heads, neurons)
        with self.as_cut(found, Cut(order, None)):
            return is_same(outputs_of(self.model), self.outputs)

    def without(self, found: FoundUnits, cut: Cut) -> Tensor:
        """Return the outputs if the units that are not kept give nothing to hidden states."""
        values: dict[Tensor, Tensor] = {}
        for kind in KINDS:
            for number, owner, units in found.parts_with(kind):
                dimension, (size,) = units.parts[f"{units.output}.weight"]
                output: Any = self.model.get_submodule(f"{owner}.{units.output}")
                count = output.weight.shape[dimension]
                kept = Axis(kind, number, size).rows(cut, count)
                gone = torch.tensor(sorted({*range(count)} - {*kept}), dtype=torch.long)
                values[output.weight] = output.weight.data.index_fill(dimension, gone, 0)
                if not kept and output.bias is not None:  # nothing at all is left
                    values[output.bias] = torch.zeros_like(output.bias.data)
        with _with_values(values):
            return outputs_of(self.model)

    def is_exact(self, found: FoundUnits, cut: Cut, config: Any) -> bool:
        """Return whether the class of a config computes the cut model."""
        other = in_double(config, self.task)
        with self.as_cut(found, cut):
            other.load_state_dict(self.model.state_dict())
        return is_same(outputs_of(other), self.without(found, cut))

    def is_exact_as_narrow(self, found: FoundUnits, cut: Cut) -> bool:
        """Return whether the class that is stored with a model computes the cut model."""
        view = cut.view or View((), ())
        heads, neurons = found.heads.fewer(view.heads), found.neurons.fewer(view.neurons)
        config = copy.deepcopy(self.config)
        setattr(config, NARROW, found._replace(heads=heads, neurons=neurons).as_keys())
        return self.is_exact(found, cut, config)

    def layers_run_narrow(self, found: FoundUnits, cut: Cut) -> bool:
        """Return whether the layers themselves compute with fewer rows of their weights."""
        layers = [units for kind in KINDS for units in found.parts_with(kind)]
        paths = {f"{o}.{name}".rpartition(".")[0] for _, o, units in layers for name in units.parts}
        for part in map(self.model.get_submodule, paths):
            # What `models.elastic` can lay over: maps, and norms, which have only vectors.
            weights = dict(part.named_parameters(recurse=False))
            is_norm = "weight" in weights and all(one.dim() == 1 for one in weights.values())
            if not (is_norm or isinstance(part, nn.Linear | Conv1D)):
                return False
        if are_of_maps(units for _, _, units in layers):
            return self.is_exact_as_narrow(found, cut)
        with self.as_cut(found, cut):
            outputs = outputs_of(self.model)
        return is_same(outputs, self.without(found, cut))

    def has_columns(self, found: FoundUnits) -> bool:
        """Return whether another order of the columns inside heads changes nothing."""
        for _, owner, units in found.parts_with("heads"):
            core = self.model.get_submodule(f"{owner}.{units.core}".removesuffix("."))
            if {of for _, of in units.parts.values()} != {(units.width,)} or not (
                # Vectors are split by it.
                len(units.makers) == 3 and hasattr(core, "attention_head_size")
            ):
                return False
        width, counts = (
            next(units.width for _, _, units in found.parts_with("heads")),
            found.heads.counts,
        )
        scores, values = (tuple((_turned(width, by),) * n for n in counts) for by in (1, 2))
        order = UnitOrder(tuple(tuple(range(n)) for n in counts), (), None, scores, values)
        return self.is_unmoved(
            found._replace(heads=found.heads._replace(can_lose_columns=True)), order
        )

    def widths(self, found: FoundUnits) -> Iterator[dict[str, tuple[int, ...]]]:
        """Yield readings of the dimensions of weights that are as long as hidden states are wide.

        Where heads together are as wide too, maps by the names of an attention tell them apart.
        """
        taken = set[tuple[str, int]]()
        for kind, read in PROPOSALS.items():
            for number, layer in enumerate(self.layers):
                known = (found.heads if kind == "heads" else found.neurons).layers[number]
                for units in [known] if known is not None else read(layer, self.config):
                    path = f"{self.blocks}.{number}."
                    taken |= {(f"{path}{name}", units.parts[name][0]) for name in units.parts}
        for others in taken, ():
            yield as_wide(self.model, found, self.config.hidden_size, others)


def signature_of(layer: nn.Module) -> str:
    """Return a text that is equal for layers with the same weights, whose sizes may differ."""
    classes = sorted({type(part).__name__ for part in layer.modules()})
    return " ".join([*classes, *(name for name, _ in layer.named_parameters())])
