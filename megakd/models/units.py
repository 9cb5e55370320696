"""Neurons and attention heads of a model without an entry in the table, and whether they can go.

The maps of a layer propose units by their shapes and names. A small copy of the model with random
weights decides: with its units in another order, and with some of them removed, by a config of the
family, it must compute what it computed before.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PretrainedConfig

from megakd.contract.tasks import TaskType
from megakd.contract.views import Kind
from megakd.models.architectures import ROUTES_TOKENS, Architecture, Known, narrow_maps
from megakd.models.config_of_layers import config_with_layers
from megakd.models.proposed_units import (
    PROPOSALS,
    WITH_OTHERS,
    Cuttable,
    FoundUnits,
    Units,
    are_of_maps,
)
from megakd.models.small_copy import first_copy
from megakd.models.units_copy import SmallCopy, signature_of, stay
from megakd.models.valueless import without_values

KINDS: tuple[Kind, Kind] = ("heads", "neurons")


class Decision(NamedTuple):
    """What a small copy has shown of one kind of units.

    forms: readings that hold, by the signature of their layers, see `_signature`.
    names: names of the weights in these readings.
    keys, head_width, is_narrow, uncut: see `Cuttable`.
    """

    forms: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]
    keys: tuple[str, ...] = ()
    head_width: str | None = None
    is_narrow: bool = False
    uncut: str | None = None


def find_units(config: Any, architecture: Architecture, task: TaskType) -> FoundUnits:
    """Return the units that a small copy of a model can lose without another change."""
    if architecture.blocks is None or architecture.repeats or architecture.parts:
        no_list = Cuttable((), uncut=_without_list(architecture))
        return FoundUnits(no_list, no_list, "")
    narrow = narrow_maps(config)
    if narrow is not None:
        whole = copy.deepcopy(config)
        del whole.narrow
        return _with_fewer(find_units(whole, architecture, task), narrow)
    blocks = f"{architecture.backbone}.{architecture.blocks}"
    layers = _layers(config, task, blocks)
    signatures = [signature_of(layer) for layer in layers]
    count = 1 + max(signatures.index(signature) for signature in {*signatures})
    decisions = _decided(config, architecture, blocks, max(count, min(2, len(layers))))
    cuttable: dict[Kind, Cuttable] = {}
    for kind in KINDS:
        decision = decisions[kind]
        pairs = zip(layers, signatures, strict=True)
        units = tuple(_as_decided(layer, of, config, kind, decision) for layer, of in pairs)
        keys, head_width, is_narrow, uncut = decision[2:]
        if uncut is None and not any(units):
            uncut = f"its layers have no {kind} by shape and name, unlike those of a small copy"
        elif keys and not _states_shapes(config, task, blocks, units, decision):
            keys = ()
            if not (is_narrow and are_of_maps(units)):
                uncut = f"its config does not state fewer {kind}, unlike that of a small copy"
        units = units if uncut is None else (None,) * len(units)
        cuttable[kind] = Cuttable(units, keys, head_width, is_narrow, uncut)
    return FoundUnits(cuttable["heads"], cuttable["neurons"], blocks)


_FOUND = Known(
    find_units,
    without=("id2label", "label2id", "dtype", "_name_or_path", "architectures", "pad_token_id"),
)


def units_of(config: PretrainedConfig, architecture: Architecture) -> FoundUnits:
    """Return the units of a model outside of the table."""
    return _FOUND.of(config, architecture, architecture.tasks[0])


def _without_list(architecture: Architecture) -> str:
    if architecture.repeats:
        return "all its layers share their weights"
    return "its lists have parts of layers" if architecture.parts else "its layers are not found"


def _with_fewer(found: FoundUnits, narrow: Mapping[str, Any]) -> FoundUnits:
    def fewer(units: Units | None, maps: Mapping[str, Sequence[int | None]]) -> Units | None:
        if units is None or units.output not in maps:
            return units
        inputs, _ = maps[units.output]
        return units._replace(total=(inputs or 0) // sum(units.parts[f"{units.output}.weight"][1]))

    heads, neurons = (
        of_kind._replace(layers=tuple(map(fewer, of_kind.layers, narrow["layers"])), keys=())
        for of_kind in (found.heads, found.neurons)
    )
    return FoundUnits(heads, neurons, found.blocks)


def _layers(config: PretrainedConfig, task: TaskType, blocks: str) -> list[nn.Module]:
    return [*without_values(config, task).get_submodule(blocks)]  # type: ignore[misc]


def _states_shapes(
    config: Any, task: TaskType, blocks: str, layers: Sequence[Units | None], decision: Decision
) -> bool:
    """Return whether a config of the model itself states fewer units in all layers."""
    known = [units for units in layers if units is not None]
    if not known or len({units.total for units in known}) > 1:
        return False
    whole = known[0].total
    kept = next((n for n in range(whole // 2, 0, -1) if whole % n == 0), 1)
    try:
        cut = with_units(config, decision, known[0], kept)
        empty = _layers(cut, task, blocks)
    except Exception:  # noqa: BLE001 - a family may refuse sizes in its own way
        return False
    return all(
        layer.get_parameter(name).shape[dimension] == kept * sum(blocks)
        for layer, units in zip(empty, layers, strict=True)
        if units is not None
        for name, (dimension, blocks) in units.parts.items()
    )


def _has_experts(layer: nn.Module) -> bool:
    # transformers holds the matrices of all experts in one weight.
    return any(
        weight.dim() == 3 and "expert" in f"{name} {type(part).__name__}".lower()
        for path, part in layer.named_modules()
        for name, weight in part.named_parameters(path, recurse=False)
    )


def _as_decided(
    layer: nn.Module, signature: str, config: Any, kind: Kind, decision: Decision
) -> Units | None:
    form = decision.forms.get(signature)
    if form is None:
        return None
    names = decision.names[signature]
    form = form.removesuffix(WITH_OTHERS)
    readings = [
        units
        for units in PROPOSALS[kind](layer, config)
        if units.form == form and (*units.parts,) == names[: len(units.parts)]
    ]
    if not readings:
        return None
    (units,) = readings
    shapes = {name: weight.shape for name, weight in layer.named_parameters()}
    parts = {name: units.parts.get(name, (0, (shapes[name][0] // units.total,))) for name in names}
    return units._replace(parts=parts, form=decision.forms[signature])


def _decided(
    config: Any, architecture: Architecture, blocks: str, count: int
) -> dict[Kind, Decision]:
    (task,) = architecture.tasks

    fewer = config_with_layers(config, architecture, range(1, count + 1))
    facts = task, blocks, count
    decisions, failed = first_copy(fewer, task, lambda small: _OF_COPIES.of(small, *facts))
    reason = f"no small copy of it runs, which decides ({failed})"
    return decisions or dict.fromkeys(KINDS, Decision({}, {}, uncut=reason))


def _decided_by_copy(
    small: PretrainedConfig, task: TaskType, blocks: str, count: int
) -> dict[Kind, Decision]:
    copied = SmallCopy(small, task, blocks, count)
    return {kind: decide(copied, kind) for kind in KINDS}


_OF_COPIES = Known(_decided_by_copy, without=())


def decide(copied: SmallCopy, kind: Kind) -> Decision:
    """Return which units of a small copy can go, and the config that states it."""
    if kind == "neurons" and any(map(_has_experts, copied.layers)):
        return Decision({}, {}, uncut=ROUTES_TOKENS)
    readings: dict[str, dict[int, list[Units]]] = {}
    for number, layer in enumerate(copied.layers):
        proposed = PROPOSALS[kind](layer, copied.config)
        if proposed:
            readings.setdefault(copied.signatures[number], {})[number] = proposed
    if not readings:
        parts = {"heads": "attention", "neurons": "feed-forward"}[kind]
        return Decision({}, {}, uncut=f"no layer has the maps of one {parts} by shape and name")
    holding, failed = _holding(copied, kind, readings)
    last = Decision({}, {}, uncut=failed)
    choices = [[*holding]] if len(holding) < 2 else [[*holding], *([one] for one in holding)]
    for signatures in choices if holding else ():
        layers = {n: units for one in signatures for n, units in holding[one].items()}
        last = _stated(copied, kind, layers)
        if last.uncut is None:
            forms = {one: next(iter(holding[one].values())) for one in signatures}
            return last._replace(
                forms={one: units.form for one, units in forms.items()},
                names={one: tuple(units.parts) for one, units in forms.items()},
            )
    return last


def _holding(
    copied: SmallCopy, kind: Kind, readings: Mapping[str, Mapping[int, list[Units]]]
) -> tuple[dict[str, dict[int, Units]], str]:
    """Return by signature the reading whose units can be in any order; and why others cannot."""
    holding: dict[str, dict[int, Units]] = {}
    failed = "its layers have one group of heads"
    for signature, of_layers in readings.items():
        for forms in zip(*of_layers.values(), strict=False):
            layers = dict(zip(of_layers, forms, strict=True))
            if min(units.total for units in forms) < 2:
                continue
            if copied.is_unmoved(layers):
                holding[signature] = layers
                break
            failed = f"another order of its {kind} changes the outputs"
    return holding, failed


def _stated(copied: SmallCopy, kind: Kind, layers: Mapping[int, Units]) -> Decision:
    shapes = copied.cut_shapes(layers)
    units, is_narrow = next(iter(layers.values())), copied.is_narrow(layers)
    for keys, head_width in candidates(copied.config, kind, units):
        stated = Decision({}, {}, keys, head_width)
        try:
            config = with_units(copied.config, stated, units, len(stay(units)))
            empty = without_values(config, copied.task).state_dict()
            if {name: weight.shape for name, weight in empty.items()} != shapes:
                continue
            if copied.is_exact(layers, config):
                return stated._replace(is_narrow=is_narrow)
        except Exception:  # noqa: BLE001, S112 - a family may refuse sizes in its own way
            continue
        return Decision(
            {}, {}, uncut=f"a model of its class without some of its {kind} computes something else"
        )
    if is_narrow and are_of_maps(layers.values()):  # for a class that is stored with the model
        return Decision({}, {}, is_narrow=True)
    more = ", and takes their width from that of the hidden states" if kind == "heads" else ""
    return Decision({}, {}, uncut=f"no key of its config states fewer {kind} alone{more}")


def with_units(
    config: Any, stated: Decision | Cuttable, units: Units, kept: int
) -> PretrainedConfig:
    """Return the config of a model that keeps some of the units of each layer.

    Raises:
        ValueError: the config cannot state them.
    """
    changes = changed_keys(config, stated.keys, kept, units.total)
    if stated.head_width is not None:
        changes[stated.head_width] = units.width
    return type(config).from_dict({**config.to_dict(), **changes})


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
            if key not in others
            and (value if isinstance(value, list) else [value])
            and all(
                type(one) is int and one in values
                for one in (value if isinstance(value, list) else [value])
            )
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
    usual = [aliases.get("num_attention_heads", "num_attention_heads")]
    keys = aliases.get("num_key_value_heads", "num_key_value_heads")
    usual += [keys] if stored.get(keys) is not None else []
    sized = tuple(k for k in with_values(queries, units.total) if re.search("head|kv|group", k))
    for head_width in (None, "head_dim"):
        yield tuple(usual), head_width
        yield sized, head_width


def changed_keys(config: Any, keys: Sequence[str], kept: int, whole: int) -> dict[str, Any]:
    """Return the values of keys for `kept` of `whole` units.

    Raises:
        ValueError: a value is not a multiple of the units.
    """

    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(one) for one in value]
        if type(value) is bool:
            return False
        if value is None or _ADJUSTED in keys:
            return kept
        if value * kept % whole:
            raise ValueError(f"{value} is no multiple of {whole} units")
        return value * kept // whole

    stored = config.to_dict()
    return {key: scaled(stored.get(key)) for key in keys}
