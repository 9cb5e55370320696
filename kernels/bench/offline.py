"""Compiles Triton kernels for an sm_90 GPU that is not there, as the public functions launch them.

CPU tensors stand for CUDA tensors; nothing is executed. TRITON_INTERPRET must not be set when this
module is imported.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megakd_kernels import triton as kernels
from megakd_kernels.triton import launching

HOPPER = launching.Card(processors=132, shared_memory=232_448)


class _AbsentGpu:
    """Answers the questions of the compiler to a driver."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead_of_launching(compiled: Callable[[str, Any], None]) -> None:
    """Replace every launch of this process by a compilation."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    absent: Any = _AbsentGpu()
    driver.set_active(absent)
    run = JITFunction.run

    def compile_only(
        self: Any, *arguments: object, grid: object, warmup: bool, **options: object
    ) -> object:
        del warmup
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled(self.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    # Tiles and dtypes are those of the GPU.
    launching.card_of = lambda _: HOPPER
    # The kernels are defined by now; this only lets CPU tensors through.
    os.environ["TRITON_INTERPRET"] = "1"
