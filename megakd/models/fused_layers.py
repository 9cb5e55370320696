"""Norms, gated products and rotations of a model, each compiled to one kernel by torch.

Between its matrix products, a decoder reads and writes its hidden states in some 38 small kernels a
layer; fused, these are 15. Only functions without hooks and submodules are compiled: the hooks of
ZeRO 3, of adapters and of losses on layers, which a compiled module would skip, stay outside.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import permutations
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from megakd.config.task import FusedLayers, TaskType
from megakd.engine.collectives import gather
from megakd.errors import ConfigError, one_line
from megakd.models.fitting import ModelSource
from megakd.models.quantized import scaled_rows
from megakd.models.small_copy import without_values

logger = logging.getLogger(__name__)
Forwards = dict[nn.Module, Callable[..., Any]]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
KEY = "train.fused_layers"
WIDTH, INNER = 8, 12
"""Sizes of the small modules that are tried."""
NO_PARTS = "it has no RMSNorm, gated MLP or rotation of queries and keys in a form that is known"


def fuse_layers(
    model: nn.Module, source: ModelSource, choice: FusedLayers, device: torch.device
) -> None:
    """Compile the norms, gated products and rotations of a loaded model; a collective.

    auto: on a GPU, if the model has such parts and torch can compile there.

    Raises:
        ConfigError: they are asked for, and the model or the environment lacks them.
    """
    if not is_fused(choice, device.type):
        logger.debug("%s: not fused (%s: %s, %s)", source.where, KEY, choice, device.type)
        return
    # All ranks compute alike, also if one of them lacks a compiler.
    reason = next(filter(None, gather(why_not_compiled(device))), None)
    forwards = {} if reason else fused_forwards(model)
    if not forwards:
        reason = reason or NO_PARTS
        if choice == "on":
            raise _refused(source, reason)
        logger.info("%s: the layers are not fused (%s): %s", source.where, KEY, reason)
    else:
        counts = Counter(type(part).__name__ for part in forwards)
        parts = ", ".join(f"{count} {name}" for name, count in counts.items())
        logger.info("%s: fused (%s): %s", source.where, KEY, parts)
    for part, forward in forwards.items():
        part.forward = forward.__get__(part)


def is_fused(choice: FusedLayers, device: str) -> bool:
    """Return whether layers are fused on a type of device, if the model and torch can."""
    return choice == "on" or (choice == "auto" and device != "cpu")


def check_fused_layers(source: ModelSource, task: TaskType) -> None:
    """Raise if fused layers are asked for and a model has none; no weights are needed."""
    if not fused_forwards(without_values(source.config, task)):
        raise _refused(source, NO_PARTS)


def _refused(source: ModelSource, reason: str) -> ConfigError:
    return ConfigError(
        f"{KEY}: on: the {source.config.model_type} model of {source.where} cannot have fused "
        f"layers: {reason}; use auto, or remove the key"
    )


@cache
def why_not_compiled(device: torch.device) -> str | None:
    """Return why torch cannot compile for a device; None: it can."""
    try:
        torch.compile(lambda x: x + 1, dynamic=True)(torch.ones(4, device=device))
    except Exception as error:  # noqa: BLE001 - of Triton, of a C++ compiler, of a subprocess
        return f"torch.compile fails on {device.type}: {one_line(error)}"
    return None


def compiled(function: Any) -> Callable[..., Any]:
    """Return a function that torch compiles at its first call."""
    # torch counts graphs by code: a copy, so that student and teacher do not share the limit of 8.
    return torch.compile(_copied(function), dynamic=True)


def fused_forwards(model: nn.Module, fuse: Compile = compiled) -> Forwards:
    """Return the forwards of the parts of a model that can be fused; nothing is compiled yet.

    The functions of parts are tried on small copies of these, whose weights are sharded at ZeRO 3.

    fuse: makes one kernel of a function without submodules.
    """
    forwards: Forwards = {}
    by_kind: dict[object, Callable[..., Any] | None] = {}
    for part in model.modules():
        kind = type(part)
        is_plain = isinstance(kind.forward, FunctionType) and "forward" not in vars(part)
        if not is_plain or kind.__module__.startswith("torch."):
            continue
        if kind not in by_kind:
            by_kind[kind] = (
                _fused_norm(part, fuse) or _fused_product(part, fuse) or _fused_rotation(part, fuse)
            )
        forward = by_kind[kind]
        if forward is not None:
            forwards[part] = forward
    return forwards


def _fused_norm(part: nn.Module, fuse: Compile) -> Callable[..., Any] | None:
    # Its function is the same for a multiple of a row, and a factor for each column.
    if [*part._modules] or [*part._parameters] != ["weight"]:  # noqa: SLF001 - sharded are empty
        return None
    weight = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))
    rows = _rows(4 * WIDTH, WIDTH) * 100  # beside which epsilon is small
    outputs = _tried(part, {"weight": weight}, rows)
    if outputs is None or outputs.shape != rows.shape:
        return None
    factors = outputs / (rows * rows.square().mean(-1, keepdim=True).rsqrt())
    is_norm = torch.allclose(factors, factors[:1].expand_as(factors), rtol=1e-4)
    return fuse(type(part).forward) if is_norm else None


def _fused_product(part: nn.Module, fuse: Compile) -> Callable[..., Any] | None:
    linear = [name for name, child in part.named_children() if isinstance(child, nn.Linear)]
    others = [child for child in part.children() if not isinstance(child, nn.Linear)]
    if len(linear) != 3 or len(others) != 1 or [*others[0].parameters()]:
        return None
    (act,), rows = others, _rows(4, WIDTH)

    def product(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    for gate, up, down in permutations(linear):
        small = {name: nn.Linear(WIDTH, INNER) for name in (gate, up)}
        small[down] = nn.Linear(INNER, WIDTH)
        for child in small.values():
            child.weight.data.copy_(_rows(*child.weight.shape))
            nn.init.zeros_(child.bias)
        forward = _gated(product, gate, up, down)
        outputs = _tried(part, small, rows)
        if outputs is not None and torch.allclose(
            outputs, _tried(part, small, rows, forward), rtol=1e-5
        ):
            return _gated(fuse(product), gate, up, down)
    return None


def _gated(
    product: Callable[..., Tensor], gate: str, up: str, down: str
) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, hidden: Tensor) -> Tensor:
        inner = product(getattr(self, gate)(hidden), getattr(self, up)(hidden))
        return getattr(self, down)(inner)

    return forward


def _fused_rotation(part: nn.Module, fuse: Compile) -> Callable[..., Any] | None:
    # Attentions of transformers call a function of their file, which takes a cosine and a sine, and
    # an 8-bit layer scales its rows.
    forward: Any = type(part).forward
    scope, code = forward.__globals__, forward.__code__
    called = {
        name: scope[name] for name in code.co_names if isinstance(scope.get(name), FunctionType)
    }
    rotations = {
        name: fuse(function)
        for name, function in called.items()
        if function is scaled_rows
        or {"cos", "sin"} <= {*function.__code__.co_varnames[: function.__code__.co_argcount]}
    }
    return _copied(forward, **rotations) if rotations else None


def _copied(function: Any, **names: object) -> Any:
    scope = {**function.__globals__, **names} if names else function.__globals__
    copied = FunctionType(
        function.__code__.replace(),
        scope,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _rows(*shape: int) -> Tensor:
    # Without random numbers, which a run counts.
    return torch.arange(1, torch.Size(shape).numel() + 1).mul(1.7).sin().reshape(shape)


def _tried(
    part: nn.Module,
    weights: dict[str, Any],
    rows: Tensor,
    forward: Callable[..., Any] | None = None,
) -> Any:
    """Return what a part computes of rows with other weights; None: it does not take them."""
    small: Any = type(part).__new__(type(part))
    plain = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    nn.Module.__init__(small)
    vars(small).update(plain)
    for name, child in part.named_children():
        small.add_module(name, child)
    for name, weight in weights.items():
        setattr(small, name, weight)
    try:
        with torch.no_grad():
            outputs = (forward or type(part).forward)(small, rows)
    except Exception:  # noqa: BLE001 - any module may refuse one input
        return None
    return outputs if isinstance(outputs, Tensor) else None
