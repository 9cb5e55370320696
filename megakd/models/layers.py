"""Models made of some layers of a stored model; no weight is read or copied for this."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from megakd.config.run import RunConfig
from megakd.config.sections import KeptLayers
from megakd.config.task import TaskType
from megakd.engine.sharding import full_shape, sharded_construction
from megakd.errors import ModelError, one_line
from megakd.models.architectures import Architecture, Known, config_with_layers
from megakd.models.fitting import ModelSource, as_in_model, specified
from megakd.models.small_copy import (
    TOKENS,
    copy_that_runs,
    first_copy,
    logits_of,
    new_model,
    without_values,
)
from megakd.models.structure import UNRELATED, architecture_of
from megakd.models.views import View, evenly_spaced, most_important
from megakd.models.weights import StoredTensor

logger = logging.getLogger(__name__)

_NO_COPY = "no small copy of it runs, which would show it"
_OF_ALL_LAYERS = "relative_attention_bias"
"""T5's position bias, which is always stored in the first layer."""


def with_layers(
    source: ModelSource,
    wanted: int | Sequence[int],
    *,
    where: str,
    scores: Sequence[float] | None = None,
) -> ModelSource:
    """Return the model with fewer layers, in the given order; embeddings and head stay.

    Args:
        wanted: numbers of layers from 1, or the count of layers.
        scores: importance of every layer, by which a count of layers is chosen; None: the first
            layer, the last layer, and evenly spaced layers between them.
    """
    architecture = source.architecture
    numbers = _numbers(source, wanted, where, scores)
    check_depth(source, numbers, where=where)
    return dataclasses.replace(
        source,
        config=config_with_layers(source.config, architecture, numbers),
        stored=dict(_stored_with_layers(source, numbers)),
        layers=numbers,
    )


def _stored_with_layers(
    source: ModelSource, numbers: Sequence[int]
) -> Iterator[tuple[str, StoredTensor]]:
    stored, remaining = source.stored, RemainingLayers(source.config, numbers)
    if stored:
        # A file may have other names than the model, which transformers changes while it loads.
        with torch.device("meta"), sharded_construction(None, torch.float32):
            whole = new_model(source.config, source.architecture.tasks[0])
        stored, _ = as_in_model(whole, stored, whole.state_dict())
    for name, tensor in stored.items():
        renamed, block = remaining.name(name), remaining.block(name, tensor.shape)
        if renamed is not None:
            yield renamed, tensor if block is None else tensor.chosen(*block)


def check_depth(source: ModelSource, numbers: Sequence[int], *, where: str) -> None:
    """Raise if the model of some layers is not the whole model with the others passed by.

    A small copy of the model decides, of which no weight is read. A warning says if it no longer
    generates text with a cache, as a hybrid without its attention layers.

    Args:
        numbers: of the layers that stay, counted from 1, in their new order.
    """
    config, architecture = source.config, source.architecture
    if architecture.blocks is None:
        raise ModelError(
            f"{where}: the layers of a {config.model_type} model are not found, so that none can "
            "be left out"
        )
    if [*numbers] == [*range(1, architecture.number_of_layers(config) + 1)]:
        return
    difference, failed = _DIFFERENCES.answer(config, architecture.tasks[0], *numbers)
    if failed is not None:
        _warn(where, failed)
    if difference is not None:
        raise ModelError(
            f"{where}: a {config.model_type} model cannot keep the layers "
            f"{', '.join(map(str, numbers))} alone: {difference}; keep other "
            "layers, such as the first ones, or give a student with its own config; the model can "
            "teach as it is"
        )


@torch.no_grad()
def _difference(
    config: PretrainedConfig, task: TaskType, *numbers: int
) -> tuple[str | None, str | None]:
    # How the smaller model differs from what the larger one is without its other layers, and why
    # it alone does not generate.
    architecture = architecture_of(config)
    left = {*range(1, architecture.number_of_layers(config) + 1)} - {*numbers}
    whole = copy_that_runs(config, task, tokens=TOKENS)
    if whole is None:
        return None if architecture.shares_bias else _NO_COPY, None
    try:
        with left_out(whole, *left):
            expected = logits_of(whole, TOKENS)
        smaller = _with_rest(whole, architecture, sorted(numbers))
        actual = logits_of(smaller, TOKENS)
    except Exception as error:  # noqa: BLE001 - any model may fail in its own way
        return one_line(error)[:200], None
    if not (actual - expected).abs().max() <= 1e-5 * expected.abs().max():
        return "its outputs are not those of the whole model with the other layers passed by", None
    failed = _failed_to_generate(smaller) if task == "causal_lm" else None
    if failed is None or _failed_to_generate(whole) is not None:
        return None, None
    return None, (
        f"a {config.model_type} model of the layers {', '.join(map(str, numbers))} alone cannot "
        f"generate text with a cache ({failed}); keep one of the attention layers too, or "
        "generate with use_cache=False, which is slow"
    )


def _failed_to_generate(model: Any) -> str | None:
    tokens = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    try:
        model.generate(**tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    except Exception as error:  # noqa: BLE001 - any model may fail in its own way
        return one_line(error)[:200]
    return None


_DIFFERENCES = Known(_difference, without=UNRELATED)


@functools.cache
def _warn(where: str, failed: str) -> None:  # once for each key
    logger.warning("%s: %s", where, failed)


def _with_rest(
    whole: PreTrainedModel, architecture: Architecture, numbers: Sequence[int]
) -> PreTrainedModel:
    """Return the model of some layers as its class builds it from a file, with their weights."""
    fewer = config_with_layers(whole.config, architecture, numbers)
    with TemporaryDirectory() as folder:  # a file may say less than the config in memory
        fewer.save_pretrained(folder)
        fewer = type(fewer).from_pretrained(folder)
    try:
        smaller = new_model(fewer, architecture.tasks[0], dtype=torch.float32).eval()
    except ArithmeticError as error:  # RWKV divides by the number of the other layers
        raise ModelError(
            f"its class cannot be built with {len(numbers)} of them ({one_line(error)})"
        ) from error
    remaining, shapes = RemainingLayers(whole.config, numbers), smaller.state_dict()
    state = dict(remaining.select(whole.state_dict().items()))
    for name, value in state.items():
        if name in shapes and value.shape != shapes[name].shape:
            raise ModelError(
                f"the size of {name}, a weight outside of the layers, follows their number"
            )
    smaller.load_state_dict(state)
    return smaller


def _numbers(
    source: ModelSource, wanted: int | Sequence[int], where: str, scores: Sequence[float] | None
) -> tuple[int, ...]:
    count = source.depth
    if isinstance(wanted, int) and wanted <= count:
        return chosen_layers(source, wanted, scores)
    if isinstance(wanted, int):
        raise ModelError(
            f"{where}: must be at most {count}, the number of layers of the model (got {wanted})"
        )
    beyond = [number for number in wanted if number > count]
    if beyond:
        raise ModelError(
            f"{where}: layer {beyond[0]} does not exist; the model has the layers 1 to {count}"
        )
    return tuple(wanted)


def chosen_layers(
    source: ModelSource, count: int, scores: Sequence[float] | None = None
) -> tuple[int, ...]:
    """Return as many layers as asked that can do without the others, counted from 1.

    Those without which others do not compute the same are among them, such as the layer whose keys
    later ones share, and one attention layer of a hybrid, without which it cannot generate.

    Args:
        scores: importance of every layer, by which the others are chosen; None: the first, the
            last, and evenly spaced ones.
    """
    needed = list[int]()
    while True:
        others = [number for number in range(1, source.depth + 1) if number not in needed]
        free = count - len(needed)
        places = (
            evenly_spaced(len(others), free)
            if scores is None
            else most_important([scores[number - 1] for number in others], free)
        )
        numbers = sorted([*needed, *(others[place - 1] for place in places)])
        left = [number for number in others if number not in numbers]
        if not free or not left or _can_stay(source, numbers):
            return tuple(numbers)

        def can_stay_with(
            some: int, *, others: Sequence[int] = left, numbers: Sequence[int] = numbers
        ) -> bool:
            return some == len(others) or _can_stay(source, sorted([*numbers, *others[:some]]))

        # More layers can always stay: the last of the fewest that help is one of those needed.
        needed.append(left[bisect_left(range(1, len(left) + 1), x=True, key=can_stay_with)])


def _can_stay(source: ModelSource, numbers: Sequence[int]) -> bool:
    task = source.architecture.tasks[0]
    return _DIFFERENCES.answer(source.config, task, *numbers) in ((None, None), (_NO_COPY, None))


@contextmanager
def left_out(model: nn.Module, *layers: int) -> Iterator[None]:
    """Let hidden states pass by layers inside the context; layers are counted from 1.

    The layers still compute, so that ZeRO 3 sees the same modules in the same order.
    """
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    architecture = architecture_of(config)
    count, backbone = architecture.number_of_layers(config), architecture.backbone_of(model)
    runs = itertools.count()

    def pass_some(*called: Any) -> Any:
        return passed_by(*called) if next(runs) % count + 1 in layers else None

    hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
    if architecture.repeats:
        hooks.append((backbone.get_submodule(architecture.blocks or ""), pass_some))
    else:
        hooks += [(architecture.block_of(model, layer), passed_by) for layer in layers]
        for path, layer in itertools.product(architecture.parts, layers):
            hooks.append((backbone.get_submodule(f"{path}.{layer - 1}"), passed_by))
        if architecture.parts:
            # Norms pass hidden states on; what other parts make is added to hidden states.
            hooks = [(p, hook if is_norm(p) else _added_nothing) for p, hook in hooks]
    with ExitStack() as active:
        for part, hook in hooks:
            active.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def is_norm(part: nn.Module) -> bool:
    """Return whether all weights of a module are vectors; the classes of norms differ by family."""
    return all(len(full_shape(weight)) == 1 for weight in part.parameters())


def _added_nothing(_: nn.Module, inputs: object, named: object, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def passed_by(
    _: nn.Module, given: Sequence[object], named: Mapping[str, object], output: Any
) -> Any:
    """Let a layer return the hidden states that it was given, as a hook."""
    first = output if isinstance(output, Tensor) else output[0]
    passed = (*given, *named.values())
    hidden = named.get("hidden_states", next(t for t in passed if isinstance(t, Tensor)))
    if isinstance(output, Tensor):
        return PassedBy.apply(hidden, output)
    return (PassedBy.apply(hidden, first), *output[1:])


class PassedBy(torch.autograd.Function):
    """The input of a layer in place of its output; the weights of the layer get gradients of zero.

    Without a gradient, ZeRO 3 would see other modules in the backward than in the forward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, output: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.zeros_like(gradients[0])


def renumbering(architecture: Architecture, numbers: Sequence[int]) -> Callable[[str], str | None]:
    """Return a function from a weight's name to its name in the model with fewer layers.

    The numbers are those of the layers that stay, counted from 1, in their new order. The function
    returns None for a weight of a layer that is left out.
    """
    blocks = architecture.blocks or ""  # `check_depth` refuses a model without a list
    if architecture.repeats:
        return lambda name: name
    lists = "|".join(map(re.escape, (blocks, *architecture.parts)))
    # A checkpoint of the bare backbone omits the name of the backbone.
    path = rf"((?:{re.escape(architecture.backbone)}\.)?(?:{lists})\.)(\d+)\."
    places = {number - 1: place for place, number in enumerate(numbers)}

    def renumber(name: str) -> str | None:
        match = re.match(path, name)
        if match is None or (architecture.shares_bias and _OF_ALL_LAYERS in name):
            return name
        place = places.get(int(match[2]))
        return None if place is None else f"{match[1]}{place}.{name[match.end() :]}"

    return renumber


def without_layers(config: PretrainedConfig, view: View) -> tuple[PretrainedConfig, View]:
    """Return the config and the view of the layers that a view keeps; both as given if all stay."""
    if view.layers is None:
        return config, view
    architecture = architecture_of(config)
    count = architecture.number_of_layers(config)
    known = tuple(number for number in range(1, count + 1) if number in view.layers)
    units = (*zip(view.heads[:count], view.neurons[:count], strict=True),)
    others = [pair for number, pair in enumerate(units, 1) if number not in view.layers]
    if not known or (*view.layers,) != known or any(map(any, others)):
        raise ModelError(
            f"the model has the layers 1 to {count}, and cannot have the layers {view.layers} "
            f"alone with these (heads, neurons) by layer: {units}"
        )
    if not view.heads:
        return config_with_layers(config, architecture, view.layers), view._replace(layers=None)
    heads, neurons = (
        tuple(units[number - 1] for number in view.layers) + units[count:]
        for units in (view.heads, view.neurons)
    )
    kept = view._replace(heads=heads, neurons=neurons, layers=None)
    return config_with_layers(config, architecture, view.layers), kept


def _find_blocks(config: PretrainedConfig) -> dict[str, int]:
    # A model of all layers but one tells by its shapes which weights are meant.
    architecture = architecture_of(config)
    count, task = architecture.number_of_layers(config), architecture.tasks[0]
    rename = renumbering(architecture, range(1, count))

    def find(small: PretrainedConfig) -> dict[str, int]:
        fewer = without_values(config_with_layers(small, architecture, range(1, count)), task)
        shapes = {name: weight.shape for name, weight in fewer.named_parameters()}
        return {
            name: dimension
            for name, weight in without_values(small, task).named_parameters()
            if rename(name) in shapes
            for dimension, (all_sizes, sizes) in enumerate(
                zip(weight.shape, shapes[name], strict=True)
            )
            if sizes < all_sizes and sizes * count == all_sizes * (count - 1)
        }

    return first_copy(config, task, find)[0] or {}


_BLOCKS = Known(_find_blocks, without=UNRELATED)
"""By name, the dimension along which a weight outside of the layers has a block for each layer."""


class RemainingLayers:
    """Where the weights of a model go in the model of some of its layers.

    Args:
        config: of the whole model.
        numbers: of the layers that stay, counted from 1, in their new order; None: all stay.
    """

    def __init__(self, config: PretrainedConfig, numbers: Sequence[int] | None) -> None:
        architecture = architecture_of(config)
        self._numbers, self._count = numbers, architecture.number_of_layers(config)
        self._rename = None if numbers is None else renumbering(architecture, numbers)
        self._blocks = {} if numbers is None else _BLOCKS.answer(config)

    def name(self, name: str) -> str | None:
        """Return the new name of a weight; None: it is left out."""
        return name if self._rename is None else self._rename(name)

    def block(self, name: str, shape: Sequence[int]) -> tuple[int, list[int]] | None:
        """Return the dimension along which a weight is cut, and the places that stay."""
        dimension = self._blocks.get(name)
        if dimension is None or self._numbers is None:
            return None
        size = shape[dimension] // self._count
        firsts = [size * (number - 1) for number in self._numbers]
        return dimension, [first + place for first in firsts for place in range(size)]

    def select(self, state: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that stay by their new names.

        An empty vector, which stands for a tensor on ranks that do not hold it, has no blocks.
        """
        for name, tensor in state:
            renamed = self.name(name)
            if renamed is None:
                continue
            block = None if tensor.shape == (0,) else self.block(name, tensor.shape)
            if block is None:
                yield renamed, tensor
            else:
                dimension, places = block
                yield (
                    renamed,
                    tensor.index_select(dimension, torch.tensor(places, device=tensor.device)),
                )


def as_student(
    source: ModelSource, config: RunConfig, scores: Sequence[float] | None = None
) -> ModelSource:
    """Return the model that the student starts as, with the layers that the student keeps."""
    student = specified(replace(source, where="student.model"), config.student)
    layers = config.student.layers
    wanted = layers.keep if isinstance(layers, KeptLayers) else layers
    if wanted is None:
        return student
    return with_layers(student, wanted, where="student.layers", scores=scores)
