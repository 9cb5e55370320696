"""Sensitivity of a model's loss to each unit, measured by gradients of gates.

A gate is a factor 1 that multiplies the values of a unit before the next module. The gradient of a
gate is the sum over the unit's weights of weight times gradient, without computing a gradient of a
weight (Michel et al. 2019, https://arxiv.org/abs/1905.10650). A column of the hidden states has one
gate in several places: at the input of each layer, and at the output of the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megakd.errors import TeacherError
from megakd.models.architectures import architecture_of
from megakd.models.axes import weight_axes
from megakd.pruning.allocation import UnitScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALLEST_NORM = 1e-17
"""Added to norms, so that scores of zero stay zero; the value of the authors' code."""


class Gates:
    """The gates of all heads and neurons of a model, sharded or not, and optionally of its width.

    Gates are plain tensors outside the model, equal on all ranks. No engine shards, casts or trains
    the gates.

    tensors: per attention one gate per key-value group, then per feed-forward one gate per neuron,
        then for the width one gate per column of the hidden states.
    """

    def __init__(
        self, model: PreTrainedModel, device: torch.device, *, with_width: bool = False
    ) -> None:
        architecture, table = architecture_of(model.config), weight_axes(model)
        units = architecture.units(model.config)
        outputs = [paths.output for paths in architecture.attentions(model.config)]
        self._attentions = len(outputs)
        outputs += [paths.output for paths in architecture.feed_forwards(model.config)]
        self._modules = [model.get_submodule(path) for path in outputs]
        self._feed_forwards = len(units.neurons)
        counts = [*units.heads, *units.neurons]
        self._streams: tuple[tuple[nn.Module, ...], ...] = ()
        if with_width:
            counts.append(architecture.hidden_width(model.config))
            self._streams = tuple(
                tuple(map(model.get_submodule, paths))
                for paths in architecture.streams(model.config)
            )
        self.tensors = [torch.ones(count, device=device, requires_grad=True) for count in counts]
        kinds = ["heads"] * self._attentions + ["neurons"] * len(units.neurons)
        self._sizes = [
            next(a.size for a in table[f"{path}.weight"] if a is not None and a.kind == kind)
            for path, kind in zip(outputs, kinds, strict=True)
        ]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Insert the gates into all forwards in the body."""
        with ExitStack() as hooks:
            gates = self.tensors[: len(self._modules)]
            for module, gate, size in zip(self._modules, gates, self._sizes, strict=True):
                hooks.callback(module.register_forward_pre_hook(_through(gate, size)).remove)
            for blocks in self._streams:
                for block in blocks:
                    into = block.register_forward_pre_hook(_through(self.tensors[-1], 1))
                    hooks.callback(into.remove)
                out = blocks[-1].register_forward_hook(_out_through(self.tensors[-1]))
                hooks.callback(out.remove)
            yield

    def gradients(self, loss: Tensor) -> Tensor:
        """Return [units] fp32 gradients of all gates for a scalar loss of a forward with gates."""
        return torch.cat(torch.autograd.grad(loss, self.tensors))

    def scores(self, totals: Tensor) -> UnitScores:
        """Return the scores of each layer and of the width, each divided by its L2 norm.

        Args:
            totals: [units], sums of absolute gradients in the order of `gradients`.

        Raises:
            TeacherError: a sum is not finite.
        """
        layers = totals.double().cpu().split([gate.numel() for gate in self.tensors])
        for number, layer in enumerate(layers):
            if not layer.isfinite().all():
                raise TeacherError(self._not_finite(number))
        normalised = [layer / (layer.norm() + SMALLEST_NORM) for layer in layers]
        parts = self._attentions, self._attentions + self._feed_forwards
        heads, neurons = normalised[: parts[0]], normalised[parts[0] : parts[1]]
        width = _numbers(normalised[parts[1] :])
        return UnitScores(_numbers(heads), _numbers(neurons), *width)

    def _not_finite(self, number: int) -> str:
        if number < self._attentions:
            what = f"heads of attention {number + 1}"
        elif number < self._attentions + self._feed_forwards:
            what = f"neurons of feed-forward {number - self._attentions + 1}"
        else:
            what = "columns of the hidden states"
        return (
            f"the importance of the {what} is not finite: the teacher's loss or its gradient "
            "overflows; set teacher.dtype to bf16 or fp32, or train the teacher again"
        )


def _numbers(layers: Sequence[Tensor]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(layer.tolist()) for layer in layers)


def _through(gate: Tensor, size: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (Gate.apply(inputs[0], gate, size), *inputs[1:])

    return hook


def _out_through(gate: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        del module, inputs
        if isinstance(output, Tensor):
            return Gate.apply(output, gate, 1)
        hidden, *others = output  # T5 returns the position bias in addition to the hidden states
        return (Gate.apply(hidden, gate, 1), *others)

    return hook


class Gate(torch.autograd.Function):
    """Multiplication by ones, which returns the values unchanged and sums gradients in fp32.

    A real product would keep an fp32 copy of every activation of a bf16 model, or round the sums.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, gate: Tensor, size: int) -> Tensor:
        """Return the values [..., units * size] unchanged; `gate` [units] holds ones."""
        ctx.save_for_backward(values)
        ctx.shape = (gate.numel(), size)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the values' gradient unchanged, and the gate's [units], summed over positions."""
        (values,), (gradient,) = ctx.saved_tensors, gradients
        products = (values.float() * gradient.float()).flatten(0, -2).sum(0)
        return gradient, products.unflatten(0, ctx.shape).sum(1), None
