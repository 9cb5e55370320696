"""Neurons and attention heads of a model, and whether they can go.

The maps of a layer propose units by their shapes and names. A small copy of the model with random
weights decides: with its units in another order, and with some of them removed, by a config of the
family, it must compute what it computed before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

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

T = TypeVar("T")
KINDS: tuple[Kind, Kind] = ("heads", "neurons")


class Decision(NamedTuple):
    """What a small copy has shown of one kind of units.

    forms: units of a layer of the copy whose reading holds, by the signature of the layer.
    cuttable: what holds for all layers; it has none.
    """

    forms: Mapping[str, Units]
    cuttable: Cuttable


def _not(reason: str) -> Decision:
    return Decision({}, Cuttable(uncut=reason))


def find_units(config: Any, architecture: Architecture, task: TaskType) -> FoundUnits:
    """Return the units that a small copy of a model can lose without another change."""
    if architecture.blocks is None or architecture.repeats or architecture.parts:
        no_list = Cuttable(uncut=_without_list(architecture))
        return FoundUnits(no_list, no_list, "")
    narrow = narrow_maps(config)
    if narrow is not None:
        return FoundUnits.from_keys(narrow)
    blocks = f"{architecture.backbone}.{architecture.blocks}"
    layers = _layers(config, task, blocks)
    signatures = [signature_of(layer) for layer in layers]
    count = 1 + max(signatures.index(signature) for signature in {*signatures})
    decisions = _decided(config, architecture, blocks, max(count, min(2, len(layers))))
    cuttable: dict[Kind, Cuttable] = {}
    for kind in KINDS:
        forms, decided = decisions[kind]
        pairs = zip(layers, signatures, strict=True)
        units = tuple(_as_decided(layer, config, kind, forms.get(of)) for layer, of in pairs)
        uncut = decided.uncut
        if uncut is None and not any(units):
            uncut = f"its layers have no {kind} by shape and name, unlike those of a small copy"
        elif decided.keys and not _states_shapes(config, task, blocks, units, decided):
            decided = decided._replace(keys=())
            if not (decided.is_narrow and are_of_maps(units)):
                uncut = f"its config does not state fewer {kind}, unlike that of a small copy"
        units = units if uncut is None else (None,) * len(units)
        cuttable[kind] = decided._replace(layers=units, uncut=uncut)
    return FoundUnits(cuttable["heads"], cuttable["neurons"], blocks)


_FOUND = Known(
    find_units,
    without=("id2label", "label2id", "dtype", "_name_or_path", "architectures", "pad_token_id"),
)


def units_of(config: PretrainedConfig, architecture: Architecture) -> FoundUnits:
    """Return the units of a model."""
    return _FOUND.of(config, architecture, architecture.tasks[0])


def _without_list(architecture: Architecture) -> str:
    if architecture.repeats:
        return "all its layers share their weights"
    return "its lists have parts of layers" if architecture.parts else "its layers are not found"


def _layers(config: PretrainedConfig, task: TaskType, blocks: str) -> list[nn.Module]:
    return [*without_values(config, task).get_submodule(blocks)]  # type: ignore[misc]


def _states_shapes(
    config: Any, task: TaskType, blocks: str, layers: Sequence[Units | None], stated: Cuttable
) -> bool:
    """Return whether a config of the model itself states fewer units in all layers."""
    known = [units for units in layers if units is not None]
    if not known or len({units.total for units in known}) > 1:
        return False
    whole = known[0].total
    kept = next((n for n in range(whole // 2, 0, -1) if whole % n == 0), 1)
    empty = _tried(lambda: _layers(with_units(config, stated, known[0], kept), task, blocks))
    return empty is not None and all(
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


def _as_decided(layer: nn.Module, config: Any, kind: Kind, form: Units | None) -> Units | None:
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


def _decided(
    config: Any, architecture: Architecture, blocks: str, count: int
) -> dict[Kind, Decision]:
    (task,) = architecture.tasks

    fewer = config_with_layers(config, architecture, range(1, count + 1))
    facts = task, blocks, count
    decisions, failed = first_copy(fewer, task, lambda small: _OF_COPIES.of(small, *facts))
    reason = f"no small copy of it runs, which decides ({failed})"
    return decisions or dict.fromkeys(KINDS, _not(reason))


def _decided_by_copy(
    small: PretrainedConfig, task: TaskType, blocks: str, count: int
) -> dict[Kind, Decision]:
    copied = SmallCopy(small, task, blocks, count)
    return {kind: decide(copied, kind) for kind in KINDS}


_OF_COPIES = Known(_decided_by_copy, without=())


def decide(copied: SmallCopy, kind: Kind) -> Decision:
    """Return which units of a small copy can go, and the config that states it."""
    if kind == "neurons" and any(map(_has_experts, copied.layers)):
        return _not(ROUTES_TOKENS)
    readings: dict[str, dict[int, list[Units]]] = {}
    for number, layer in enumerate(copied.layers):
        proposed = PROPOSALS[kind](layer, copied.config)
        if proposed:
            readings.setdefault(copied.signatures[number], {})[number] = proposed
    if not readings:
        parts = {"heads": "attention", "neurons": "feed-forward"}[kind]
        return _not(f"no layer has the maps of one {parts} by shape and name")
    holding, failed = _holding(copied, kind, readings)
    last = Cuttable(uncut=failed)
    choices = [[*holding]] if len(holding) < 2 else [[*holding], *([one] for one in holding)]
    for signatures in choices if holding else ():
        layers = {n: units for one in signatures for n, units in holding[one].items()}
        last = _stated(copied, kind, layers)
        if last.uncut is None:
            forms = {one: next(iter(holding[one].values())) for one in signatures}
            return Decision(forms, last)
    return Decision({}, last)


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


def _stated(copied: SmallCopy, kind: Kind, layers: Mapping[int, Units]) -> Cuttable:
    shapes, units = copied.cut_shapes(layers), next(iter(layers.values()))
    is_narrow = _tried(lambda: copied.is_narrow(layers))
    of_maps = bool(is_narrow) and are_of_maps(layers.values())
    is_exact = of_maps and _tried(lambda: copied.is_exact_without_heads(layers))
    shown = Cuttable(
        is_narrow=bool(is_narrow),
        to_zero=of_maps and (kind == "neurons" or bool(is_exact)),
        columns=of_maps and kind == "heads" and copied.has_columns(layers),
    )

    def is_stated(keys: Cuttable) -> bool | None:
        config = with_units(copied.config, keys, units, len(stay(units)))
        empty = without_values(config, copied.task).state_dict()
        has_shapes = {name: weight.shape for name, weight in empty.items()} == shapes
        return copied.is_exact(layers, config) if has_shapes else None

    for keys, head_width in candidates(copied.config, kind, units):
        stated = shown._replace(keys=keys, head_width=head_width)
        holds = _tried(partial(is_stated, stated))
        if holds:
            return stated
        if holds is None:
            continue
        return Cuttable(
            uncut=f"a model of its class without some of its {kind} computes something else"
        )
    if of_maps:  # for a class that is stored with the model
        return shown
    more = ", and takes their width from that of the hidden states" if kind == "heads" else ""
    return Cuttable(uncut=f"no key of its config states fewer {kind} alone{more}")


def _tried(check: Callable[[], T]) -> T | None:
    """Return what a check returns; None: the code of the family refuses it in its own way."""
    try:
        return check()
    except Exception:  # noqa: BLE001
        return None


def with_units(config: Any, stated: Cuttable, units: Units, kept: int) -> PretrainedConfig:
    """Return the config of a model that keeps some of the units of each layer.

    Raises:
        ValueError: the config cannot state them.
    """
    changes = changed_keys(config, stated.keys, kept, stated.stated or units.total)
    if stated.head_width is not None:
        changes[stated.head_width] = units.width
    return type(config).from_dict({**config.to_dict(), **changes})


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
    sized = tuple(k for k in with_values(queries, units.total) if re.search("head|kv|group", k))
    for head_width in (None, "head_dim"):
        yield head_keys(config), head_width
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
