"""Compiles Triton kernels for a GPU that is not there, as the public functions launch them.

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

# Bytes of shared memory that a program may use, by compute capability.
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


class _AbsentGpu:
    """Answers the questions of the compiler to a driver."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device.
        return self._capability

    def get_current_stream(self, _device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_instead_of_launching(compiled: Callable[[str, Any], None]) -> None:
    """Replace every launch of this process by a compilation for the GPU of `pretend`."""
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    run = JITFunction.run

    def compile_only(
        self: Any, *arguments: object, grid: object, warmup: bool, **options: object
    ) -> object:
        del warmup
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled(self.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    # The kernels are defined by now; this only lets CPU tensors through.
    os.environ["TRITON_INTERPRET"] = "1"


def pretend(capability: int) -> None:
    """Compile for a GPU of this compute capability from now on; tiles and dtypes are its own."""
    absent: Any = _AbsentGpu(capability)
    driver.set_active(absent)
    launching.shared_memory_of = lambda _: SHARED_MEMORY[capability]
