"""A small copy of a model with random weights, which shows whether units can go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from megakd.contract.tasks import TaskType
from megakd.errors import ModelError
from megakd.models.architectures import NARROW
from megakd.models.proposed_units import Blocks, Cuttable, FoundUnits, Units, are_of_maps
from megakd.models.small_copy import TOKENS, logits_of, new_copy

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


def _in_double(config: PretrainedConfig, task: TaskType) -> PreTrainedModel:
    model = new_copy(config, task, dtype=torch.float64, attention="eager")
    if any(hasattr(type(part), "_apply_gate") for part in model.modules()):
        model.set_experts_implementation("eager")
    return model.double()


def _outputs(model: PreTrainedModel) -> Tensor:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)  # convolutions in fp64 take seconds with several threads
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), InDouble():
            return logits_of(model, TOKENS)
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def _is_same(one: Tensor, other: Tensor) -> bool:
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


def stay(units: Units) -> range:
    """Return the units that a small copy keeps: those with odd numbers."""
    return range(1, units.total, 2)


class SmallCopy:
    """A small copy of a model that runs, with random values, and its layers."""

    def __init__(self, config: Any, task: TaskType, blocks: str, layers: int) -> None:
        self.config, self._blocks = config, blocks
        self.task: TaskType = task
        self.model = _in_double(config, task)
        self.layers: Sequence[nn.Module] = [*self.model.get_submodule(blocks)]  # type: ignore[misc]
        # Before the forward, in which some models exchange their modules.
        self.signatures = [signature_of(layer) for layer in self.layers]
        if len(self.layers) != layers:
            raise ModelError(f"a copy with {layers} layers has {len(self.layers)}")
        self.outputs = _outputs(self.model)
        if not self.outputs.isfinite().all():
            raise ModelError("the outputs of a small copy are not finite")

    @contextmanager
    def with_rows(
        self,
        layers: Mapping[int, Units],
        rows: Callable[[Units], Sequence[int]],
    ) -> Iterator[None]:
        """Let the layers have these units, in this order, in all their weights, in the body."""
        values: dict[Tensor, Tensor] = {}
        for number, units in layers.items():
            for name, (dimension, blocks) in units.parts.items():
                weight = self.layers[number].get_parameter(name)
                values[weight] = taken(weight.data, dimension, blocks, rows(units), units.total)
        with _with_values(values):
            yield

    def is_unmoved(self, layers: Mapping[int, Units]) -> bool:
        """Return whether another order of the units changes nothing, and their values do."""

        def turned(units: Units) -> list[int]:
            return [(place + 1) % units.total for place in range(units.total)]

        with self.with_rows(layers, turned):
            return _is_same(_outputs(self.model), self.outputs)

    @contextmanager
    def without(
        self, layers: Mapping[int, Units], kept: Callable[[Units], range] = stay
    ) -> Iterator[Tensor]:
        """Yield the outputs if the units that are not kept give nothing to hidden states."""
        values: dict[Tensor, Tensor] = {}
        for number, units in layers.items():
            name = f"{units.output}.weight"
            dimension, (size,) = units.parts[name]
            output = self.layers[number].get_submodule(units.output)
            weight = self.layers[number].get_parameter(name)
            gone = [row for unit in {*range(units.total)} - {*kept(units)}
                    for row in range(unit * size, (unit + 1) * size)]  # fmt: skip
            values[weight] = weight.data.index_fill(dimension, torch.tensor(gone), 0)
            if not kept(units) and isinstance(output.bias, Tensor):  # nothing at all is left
                values[output.bias] = torch.zeros_like(output.bias.data)
        with _with_values(values):
            yield _outputs(self.model)

    def cut_shapes(self, layers: Mapping[int, Units]) -> dict[str, torch.Size]:
        shapes = {name: weight.shape for name, weight in self.model.state_dict().items()}
        for number, units in layers.items():
            for name, (dimension, blocks) in units.parts.items():
                full = f"{self._blocks}.{number}.{name}"
                shape = [*shapes[full]]
                shape[dimension] = sum(blocks) * len(stay(units))
                shapes[full] = torch.Size(shape)
        return shapes

    def is_exact(
        self, layers: Mapping[int, Units], config: Any, kept: Callable[[Units], range] = stay
    ) -> bool:
        """Return whether the class of a config computes the cut model."""
        with self.without(layers, kept) as expected:
            pass
        with self.with_rows(layers, kept):
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
        other = _in_double(config, self.task)
        other.load_state_dict(state)
        return _is_same(_outputs(other), expected)

    def is_narrow(self, layers: Mapping[int, Units]) -> bool:
        """Return whether the layers themselves compute with fewer rows of their weights."""
        weights = [(self.layers[n], name) for n, units in layers.items() for name in units.parts]
        if not all(
            _can_be_narrow(layer.get_submodule(name.rpartition(".")[0])) for layer, name in weights
        ):
            return False
        if are_of_maps(layers.values()):
            return self._is_exact_as_narrow(layers, stay)
        with self.without(layers) as expected:
            pass
        with self.with_rows(layers, stay):
            return _is_same(_outputs(self.model), expected)

    def has_columns(self, layers: Mapping[int, Units]) -> bool:
        """Return whether another order of the columns inside heads changes nothing."""
        scores, values = dict[int, Units](), dict[int, Units]()
        for number, units in layers.items():
            core, sizes = self.layers[number].get_submodule(units.core), (units.width,)
            if {of for _, of in units.parts.values()} != {sizes} or len(units.makers) != 3:
                return False
            if not hasattr(core, "attention_head_size"):  # by which the vectors are split
                return False
            by_column = units._replace(total=units.total * units.width)
            parts = {name: (dimension, (1,)) for name, (dimension, _) in units.parts.items()}
            of_scores = tuple(f"{path}." for path in units.makers[:2])
            of_both = {n: one for n, one in parts.items() if n.startswith(of_scores)}
            scores[number] = by_column._replace(parts=of_both)
            others = {n: one for n, one in parts.items() if n not in of_both}
            values[number] = by_column._replace(parts=others)

        def turned(by: int, columns: Units) -> list[int]:
            width = columns.width
            rows = range(columns.total)
            return [row // width * width + (row % width + by) % width for row in rows]

        with self.with_rows(scores, partial(turned, 1)), self.with_rows(values, partial(turned, 2)):
            return _is_same(_outputs(self.model), self.outputs)

    def is_exact_without_heads(self, layers: Mapping[int, Units]) -> bool:
        """Return whether the class that is stored with a model computes a layer without heads."""
        number = min(layers)
        return self._is_exact_as_narrow({number: layers[number]}, lambda _: range(0))

    def _is_exact_as_narrow(
        self, layers: Mapping[int, Units], kept: Callable[[Units], range]
    ) -> bool:
        none = (None,) * len(self.layers)
        fewer = {n: units._replace(total=len(kept(units))) for n, units in layers.items()}
        units = Cuttable(tuple(fewer.get(number) for number in range(len(none))))
        of_kind = (units, Cuttable(none))
        heads, neurons = of_kind if next(iter(layers.values())).width > 1 else of_kind[::-1]
        config = copy.deepcopy(self.config)
        setattr(config, NARROW, FoundUnits(heads, neurons, self._blocks).as_keys())
        return self.is_exact(layers, config, kept=kept)


def _can_be_narrow(part: nn.Module) -> bool:
    # What `models.elastic` can lay over: maps, and norms, which have only vectors.
    own = dict(part.named_parameters(recurse=False))
    is_norm = "weight" in own and all(weight.dim() == 1 for weight in own.values())
    return isinstance(part, nn.Linear | Conv1D) or is_norm


def taken(
    weight: Tensor, dimension: int, blocks: Blocks, units: Sequence[int], count: int
) -> Tensor:
    """Return the rows of some units of a weight, block by block."""
    rows = torch.tensor(rows_of(units, blocks, count), dtype=torch.long)
    return weight.index_select(dimension, rows)


def rows_of(units: Sequence[int], blocks: Blocks, count: int) -> list[int]:
    """Return the rows of some of `count` units, block by block."""
    rows, first = list[int](), 0
    for size in blocks:
        rows += [first + unit * size + row for unit in units for row in range(size)]
        first += count * size
    return rows


def signature_of(layer: nn.Module) -> str:
    """Return a text that is equal for layers with the same weights, whose sizes may differ."""
    classes = sorted({type(part).__name__ for part in layer.modules()})
    return " ".join([*classes, *(name for name, _ in layer.named_parameters())])
