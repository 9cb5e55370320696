"""Which units a sub-network of a given sparsity keeps: MiniDisc's specification.

Zhang et al. 2024, https://arxiv.org/abs/2205.14570, as the authors' code has it. Torch-free:
scores, views and orders are numbers that configs, files and reports can hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from megakd.contract.units import UnitOrder, View
from megakd.errors import CheckpointError, ConfigError, TeacherError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Allocation = Literal["global", "uniform"]
Layers = tuple[tuple[float, ...], ...]
"""One number per unit, layer by layer."""

# What a message calls a layer of a kind, and its units.
_NAMES = {
    "heads": ("attention", "attention heads (key-value groups where heads share keys)"),
    "neurons": ("feed-forward", "neurons"),
}
MOST_HEADS = Fraction(9, 10)
"""Of the heads, where the residual width goes too; what they would lose beyond is neurons'."""


class UnitScores(NamedTuple):
    """How important the units of a model are; only the order of a kind's scores has a meaning.

    heads: per attention, one score per key-value group. neurons: per feed-forward.
    width: of the columns of the hidden states; None where they all stay.
    """

    heads: Layers
    neurons: Layers
    width: tuple[float, ...] | None = None


class Rounding(NamedTuple):
    """How many units of a kind go together.

    step: units are taken out in multiples of it. least: where fewer are left, none is.
    """

    step: int
    least: int

    @staticmethod
    def of(rows: int, round_to: int) -> Rounding:
        """For units of so many rows of a weight, which is cut in multiples of `round_to` rows."""
        return Rounding(round_to // math.gcd(round_to, rows), -(-round_to // rows))

    def kept(self, count: int, removed: int, *, never_all: bool = False) -> int:
        """Units that are left of `count`; `never_all` keeps the fewest there can be, not none."""
        removed = min(self.step * round(removed / self.step), count)
        kept = count - removed
        if kept >= self.least or not removed:
            return kept
        return count - max(count - self.least, 0) // self.step * self.step if never_all else 0


class Shares(NamedTuple):
    """Which share of each kind of unit a sub-network lacks."""

    heads: Fraction
    neurons: Fraction
    width: Fraction


def unit_order(scores: UnitScores) -> UnitOrder:
    """Each layer's units by falling score; equal ones as they stand in the model."""
    return UnitOrder(
        heads=tuple(_falling(layer) for layer in scores.heads),
        neurons=tuple(_falling(layer) for layer in scores.neurons),
        width=None if scores.width is None else _falling(scores.width),
    )


def _falling(layer: Sequence[float]) -> tuple[int, ...]:
    return tuple(np.argsort(-np.asarray(layer), kind="stable").tolist())


def shares_of(scores: UnitScores, sparsity: float, head_width: int) -> Shares:
    """How a sparsity is split between the kinds of units.

    Heads and neurons lose the same share. Where the residual width goes too, it and they remove
    1 - sqrt(1 - sparsity) each, so that the sparsity is the share of all weights between them
    that go: the task-agnostic variant, as the code of MiniMoE by the same authors has it. There
    heads lose nine tenths at most; of the heads beyond, as many weights are taken from the
    neurons, a head having four rows where a neuron has two.

    Args:
        scores: of all units, those of the width if it goes too.
        sparsity: in [0, 1). It counts as the decimal number it is written as.
        head_width: rows of a head's queries, keys and values.
    """
    share = Fraction(str(float(sparsity)))
    if scores.width is None:
        return Shares(share, share, Fraction(0))
    # Decimal, for its square roots are exact where there is an exact one: of 0.81, 0.64, ….
    share = Fraction(1 - (1 - Decimal(str(float(sparsity)))).sqrt())
    heads, neurons = (sum(map(len, layers)) for layers in (scores.heads, scores.neurons))
    beyond = max(share - MOST_HEADS, Fraction(0)) * heads * 2 * head_width / max(neurons, 1)
    return Shares(min(share, MOST_HEADS), min(share + beyond, Fraction(1)), share)


def view_at(
    scores: UnitScores,
    sparsity: float,
    *,
    allocation: Allocation = "global",
    round_to: int = 8,
    head_width: int = 64,
    with_heads: Collection[int] = (),
) -> View:
    """The sub-network that lacks this share of the heads and, apart from them, of the neurons.

    Where the residual width is scored it goes too, and all of them by the square root; see
    `shares_of`.

    The heads of all layers are ranked together and the round(sparsity * heads) least important
    are left out, and so with the neurons; then each layer's cut is rounded to a multiple of
    `round_to` rows, and a layer with fewer rows left than that keeps none. Views of rising
    sparsity lie within each other. Halves round to the even number, as everywhere in Python; the
    sparsity counts as the decimal number it is written as, so that 0.35 of 90 is 31.5, which it
    is not in floating point.

    Differs from the authors' code: where a head's rows are no multiple of `round_to`, as many
    whole heads as make one are taken out together.

    Args:
        scores: of the units of the whole model.
        sparsity: share to leave out, at least 0 and below 1.
        allocation: `global` as above; `uniform` takes the same share of every layer.
        round_to: in rows of the weights; 1 rounds nothing.
        head_width: rows of a head's queries, keys and values; 64 as in the paper's models.
        with_heads: attentions, from 0, that keep their most important head however sparse it gets.

    Raises:
        ConfigError: the sparsity is out of range.
        TeacherError: no heads or no neurons would be left (`uniform`: of a layer), or no width.
    """
    if not 0 <= sparsity < 1:
        raise ConfigError(
            f"a sparsity is at least 0 and below 1, the share left out; got {sparsity}"
        )
    shares = shares_of(scores, sparsity, head_width)
    kept: dict[str, tuple[int, ...]] = {}
    for kind, rows, spared in (("heads", head_width, with_heads), ("neurons", 1, ())):
        layers: Layers = getattr(scores, kind)
        rounding = Rounding.of(rows, round_to)
        fewest = [rounding.least if number in spared else 0 for number in range(len(layers))]
        removed = _removed(layers, getattr(shares, kind), allocation, fewest)
        triples = zip(layers, removed, fewest, strict=True)
        kept[kind] = tuple(
            rounding.kept(len(layer), count, never_all=bool(least))
            for layer, count, least in triples
        )
        empty = [bool(layer) and not left for layer, left in zip(layers, kept[kind], strict=True)]
        if any(empty) and (allocation == "uniform" or not any(kept[kind])):
            raise TeacherError(_exhausted(kind, layers, removed, rounding) + _advice(sparsity))
    width = _width(len(scores.width or ()), shares.width, round_to)
    if width == 0:
        raise TeacherError(_too_narrow(scores, shares.width, round_to) + _advice(sparsity))
    return View(kept["heads"], kept["neurons"], width)


def _width(whole: int, share: Fraction, round_to: int) -> int | None:
    """Columns that are left of the hidden states, a multiple of `round_to`; None: all."""
    kept = round_to * round((1 - share) * whole / round_to)
    return None if kept >= whole or not share else kept


def _too_narrow(scores: UnitScores, share: Fraction, round_to: int) -> str:
    whole = len(scores.width or ())
    return (
        f"the teacher's hidden states run out of width: they are {whole} wide and would keep "
        f"{float((1 - share) * whole):.3g}, which rounds to none in steps of {round_to}"
    )


def _removed(
    layers: Layers, share: Fraction, allocation: Allocation, fewest: Sequence[int]
) -> list[int]:
    """How many units each layer loses, before rounding; `fewest` of each go after all others."""
    if allocation == "uniform":
        return [round(share * len(layer)) for layer in layers]
    scores = np.concatenate([np.asarray(layer, dtype=float) for layer in layers])
    layer_of = np.concatenate([np.full(len(layer), i) for i, layer in enumerate(layers)])
    place = np.concatenate([np.arange(len(layer)) for layer in layers])
    spared = np.concatenate([_best(*pair) for pair in zip(layers, fewest, strict=True)])
    # By rising score. Among equals the last of each layer go first, as `unit_order` has them.
    rising = np.lexsort((-layer_of, -place, scores, spared))
    lost = layer_of[rising[: round(share * len(scores))]]
    return np.bincount(lost, minlength=len(layers)).tolist()


def _best(layer: Sequence[float], count: int) -> NDArray[np.bool_]:
    """Which units of a layer are among its `count` most important ones."""
    best = np.zeros(len(layer), dtype=bool)
    best[list(_falling(layer)[:count])] = True
    return best


def _exhausted(kind: str, layers: Layers, removed: Sequence[int], rounding: Rounding) -> str:
    """Which layer runs out: of those that do, the one that had most left before rounding."""
    layer, units = _NAMES[kind]
    left = [len(scores) - count for scores, count in zip(layers, removed, strict=True)]
    last = max(
        (i for i, scores in enumerate(layers) if not rounding.kept(len(scores), removed[i])),
        key=lambda i: left[i],
    )
    text = (
        f"the teacher runs out of {units}: {layer} {last + 1} of {len(layers)} has "
        f"{len(layers[last])} and would keep {left[last]}"
    )
    if left[last]:
        text += (
            f", and rounding takes them out by {rounding.step}, leaving {rounding.least} or none"
        )
    return text


def _advice(sparsity: float) -> str:
    return (
        f", at sparsity {sparsity:g}; lower method.target_sparsity and leave the higher ones out "
        f"of method.sparsities, lower method.round_to, or take a wider teacher"
    )


def scores_to_json(scores: UnitScores) -> str:
    """As text; every number is read back exactly."""
    return json.dumps(scores._asdict(), allow_nan=False)


def scores_from_json(text: str, *, where: str) -> UnitScores:
    """What `scores_to_json` wrote.

    Args:
        text: a file's content.
        where: the file, for the message.

    Raises:
        CheckpointError: it is something else, or damaged.
    """
    try:
        tree = json.loads(text)
        found = UnitScores(_layers(tree["heads"]), _layers(tree["neurons"]))
        width = tree.get("width")
        return found if width is None else found._replace(width=_layers([width])[0])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where} does not hold the importance of a model's units ({error}); remove it, and it "
            f"is measured again"
        ) from error


def _layers(value: Any) -> Layers:
    layers = tuple(tuple(float(score) for score in layer) for layer in value)
    if not all(math.isfinite(score) for layer in layers for score in layer):
        raise ValueError("a score is not finite")
    return layers
