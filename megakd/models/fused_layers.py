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
from inspect import signature
from itertools import permutations
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from megakd.config.task import TaskType
from megakd.engine.collectives import gather
from megakd.errors import ConfigError, one_line
from megakd.models.fitting import ModelSource
from megakd.models.quantized import scaled_rows
from megakd.models.small_copy import without_values
from megakd.process.seeding import cpu_seeded

logger = logging.getLogger(__name__)
Forwards = dict[nn.Module, Callable[..., Any]]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
KEY = "train.fused_layers"
WIDTH, INNER = 8, 12
"""Sizes of the small modules that are tried."""
MAGNITUDES = (0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
"""Of the rows that are tried, an even number."""
_CONSTANT = (bool, int, float, str, tuple, list, type(None))
NO_PARTS = "it has no RMSNorm, gated MLP or rotation of queries and keys in a form that is known"


def fuse_layers(model: nn.Module, source: ModelSource, device: torch.device) -> None:
    """Compile the norms, gated products and rotations of a loaded model; a collective.

    Raises:
        ConfigError: the model or the environment lacks them.
    """
    # All ranks compute alike, also if one of them lacks a compiler.
    reason = next(filter(None, gather(why_not_compiled(device))), None)
    forwards = {} if reason else fused_forwards(model)
    if not forwards:
        raise _refused(source, reason or NO_PARTS)
    counts = Counter(type(part).__name__ for part in forwards)
    parts = ", ".join(f"{count} {name}" for name, count in counts.items())
    logger.info("%s: fused (%s): %s", source.where, KEY, parts)
    for part, forward in forwards.items():
        part.forward = forward.__get__(part)


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

    Parts that differ in constants are tried on small copies, as weights are sharded at ZeRO 3.

    fuse: makes one kernel of a function without submodules.
    """
    forwards: Forwards = {}
    ways: dict[object, tuple[str, ...] | None] = {}
    fused: dict[object, Callable[..., Any] | None] = {}
    for part in model.modules():
        kind = type(part)
        is_plain = isinstance(kind.forward, FunctionType) and "forward" not in vars(part)
        if not is_plain or kind.__module__.startswith("torch."):
            continue
        alike = kind, _constants(part)
        if alike not in ways:
            with cpu_seeded(0):  # a run goes on with the random numbers of plain layers
                ways[alike] = () if _is_norm(part) else _names_of_product(part)
        way = ways[alike]
        # Parts that differ in other constants share what is compiled.
        shared = kind, way, _constants(part.get_submodule(way[-1])) if way else None
        if shared not in fused:
            if way:
                fused[shared] = _product(part, way, fuse)
            else:
                is_norm = way is not None
                fused[shared] = fuse(kind.forward) if is_norm else _fused_rotation(part, fuse)
        forward = fused[shared]
        if forward is not None:
            forwards[part] = forward
    return forwards


def _attributes(part: nn.Module) -> dict[str, Any]:
    base = vars(nn.Module())
    return {name: value for name, value in vars(part).items() if name not in base}


def _constants(part: nn.Module) -> object:
    """Return what parts of a class have in common if they compute alike with equal weights."""
    plain = tuple(
        (name, repr(one) if isinstance(one, _CONSTANT) or callable(one) else id(one))
        for name, one in _attributes(part).items()
    )
    children = tuple((name, _constants(child)) for name, child in part.named_children())
    return type(part), plain, (*part._parameters,), children  # noqa: SLF001


def _is_norm(part: nn.Module) -> bool:
    # Its function is the same for a multiple of a row, and a factor for each column.
    if [*part._modules] or [*part._parameters] != ["weight"]:  # noqa: SLF001 - sharded are empty
        return False
    weight = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))
    rows = _rows(4 * WIDTH, WIDTH) * 100  # beside which epsilon is small
    outputs, *_ = _tried(part, {"weight": weight}, rows) or [rows[0]]
    if outputs.shape != rows.shape:
        return False
    factors = outputs / (rows * rows.square().mean(-1, keepdim=True).rsqrt())
    return torch.allclose(factors, factors[:1].expand_as(factors), rtol=1e-4)


def _names_of_product(part: nn.Module) -> tuple[str, ...] | None:
    """Return the names of gate, up, down and activation; None: it is no gated MLP."""
    linear = [name for name, child in part.named_children() if isinstance(child, nn.Linear)]
    others = [name for name, _ in part.named_children() if name not in linear]
    if len(linear) != 3 or len(others) != 1 or [*part.get_submodule(others[0]).parameters()]:
        return None
    if len(signature(type(part).forward).parameters) != 2:
        return None
    ways = ((*names, others[0]) for names in permutations(linear))
    return next((way for way in ways if _is_product(part, way)), None)


def _is_product(part: nn.Module, way: tuple[str, ...]) -> bool:
    # Small and large values, with which limits are seen, in a training and in an evaluation.
    rows = _rows(len(MAGNITUDES), WIDTH) * torch.tensor(MAGNITUDES)[:, None]
    gate, up, down, _ = way
    for dtype, shape, learns in (
        (torch.float32, (2, -1, WIDTH), True),
        (torch.bfloat16, (-1, WIDTH), False),
    ):
        small = {name: nn.Linear(WIDTH, INNER) for name in (gate, up)}
        small[down] = nn.Linear(INNER, WIDTH)
        for child in small.values():
            for weight in child.parameters():
                weight.data = _rows(*weight.shape).to(dtype)
        inputs, plain = rows.reshape(shape).to(dtype), _product(part, way, lambda product: product)
        exact = _tried(part, small, inputs, learns=learns)
        fused = _tried(part, small, inputs, plain, learns=learns)
        if exact is None or fused is None or not all(map(_is_close, exact, fused)):
            return False
    return True


def _is_close(one: Tensor, other: Tensor) -> bool:  # also of a part that returns another dtype
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-5)


def _product(part: nn.Module, way: tuple[str, ...], fuse: Compile) -> Callable[..., Tensor]:
    gate, up, down, name = way
    act = part.get_submodule(name)

    def product(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    fused = fuse(product)

    def forward(self: Any, *args: Tensor, **named: Tensor) -> Tensor:
        (hidden,) = (*args, *named.values())
        inner = fused(getattr(self, gate)(hidden), getattr(self, up)(hidden))
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
    *,
    learns: bool = True,
) -> list[Tensor] | None:
    """Return what a part computes of rows with other weights, and gradients of rows and weights.

    None: it does not take them.
    """
    small: Any = type(part).__new__(type(part))
    nn.Module.__init__(small)
    vars(small).update(_attributes(part))
    for name, child in part.named_children():
        small.add_module(name, child)
    for name, weight in weights.items():
        setattr(small, name, weight)
    small.training, rows = learns, rows.clone().requires_grad_()
    try:
        with torch.enable_grad():
            outputs = (forward or type(part).forward)(small, rows)
            total = (outputs * _rows(*outputs.shape)).sum()
            learning = [rows, *small.parameters()]
            gradients = torch.autograd.grad(
                total, learning, allow_unused=True, materialize_grads=True
            )
    except Exception:  # noqa: BLE001 - any module may refuse one input
        return None
    return [outputs.detach(), *gradients]
