"""Operations of matrix products in the forwards of teachers and students, for their FLOP/s."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "V100": 125.0,
    "T4": 65.0,
    "MI300X": 1307.0,
}
"""Dense products of 16 bits by device, 1e12 operations per second, from the makers' data sheets."""


def peak_tflops(device: str) -> float | None:
    """Return the rate of a device by its name; None if it is not known."""
    names = (name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device))
    return next((PEAK_TFLOPS[name] for name in names), None)


def products(function: Any, args: Any, kwargs: Any, out: Any) -> tuple[float, float]:
    """Return the operations of an operator, and those of a teacher's head in a loss."""
    count = flop_registry.get(getattr(function, "overloadpacket", None))
    if count is not None:
        # Before torch 2.13, the formula of attention refuses queries that share keys.
        with suppress(AssertionError):
            return float(count(*args, **kwargs, out_val=out)), 0.0
    if not is_linear_kd(function):
        return 0.0, 0.0
    rows, width = args[0].shape
    teacher = 2.0 * rows * args[4].numel() if isinstance(args[4], Tensor) else 0.0
    return 2.0 * rows * len(args[1]) * width, teacher


def is_linear_kd(function: Any) -> bool:
    """Return whether an operator is the loss that multiplies hidden states and heads itself."""
    return getattr(function, "name", str)().partition(".")[0] == "megakd::linear_kd"


def passes_of(module: nn.Module) -> float:
    """Return the operations of a training step as a multiple of those of its forwards.

    A backward needs one product for the inputs of a product and one for its weight, if that learns.
    """
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]
    return 2.0 + sum(n for n, learns in sizes if learns) / max(1, sum(n for n, _ in sizes))


class StepOperations(TorchDispatchMode):
    """Mode that counts the operations of all forwards; what a backward repeats does not count.

    asks_teacher: returns whether a teacher's forward is running; other forwards are the student's.
    """

    def __init__(self, asks_teacher: Callable[[], bool]) -> None:
        super().__init__()
        self._asks_teacher = asks_teacher
        self.student = self.teacher = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:  # noqa: SLF001 - as torch's checkpoints ask
            of_body, of_head = products(func, args, kwargs, out)
            if self._asks_teacher():
                self.teacher += of_body
            else:
                self.student += of_body
                self.teacher += of_head
        return out
