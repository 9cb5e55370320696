"""Tensors that claim to be on cuda:0, on a machine without a GPU.

A forward on such tensors runs the same Python as on a GPU, and raises where a run on the CPU would
be silent:

* a tensor of the CPU meets a tensor of the GPU;
* the host waits for the device: `.item()`, `bool(tensor)`, `tolist()`;
* a shape depends on values, which makes the host wait too: `nonzero`, boolean indexing.

Only forwards: torch's backward asks for a real GPU. Autograd functions that compute their gradients
in the forward are covered. Random numbers on the device are not, so models have no dropout.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import cpp_extension

CUDA = torch.device("cuda:0")
SYNCS = (DataDependentOutputException, DynamicOutputShapeException)
"""Errors of code that makes the host wait for the device."""
# A build of torch for the CPU has no device guard for CUDA; this one does nothing.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
extern "C" void install() {
  static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
  if (!c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA))
    c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
}
"""


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Make tensors without values in the body; those made on `CUDA` claim to be there."""
    _install_guard()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def moved_to_cuda(module: nn.Module) -> nn.Module:
    """Replace the weights and buffers of a module, in place; tied weights stay tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and id(weight) not in made:
                made[id(weight)] = nn.Parameter(like(weight), weight.requires_grad)
            part._parameters[name] = None if weight is None else made[id(weight)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else like(buffer)
    return module


def like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)


@functools.cache
def _install_guard() -> None:
    if torch.backends.cuda.is_built():
        return
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "pretended_cuda"
    library = folder / f"guard-{torch.__version__}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"guard-{os.getpid()}.cpp"
        source.write_text(_GUARD, encoding="utf-8")
        made = source.with_suffix(".so")
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        command = ["g++", "-std=c++20", "-shared", "-fPIC", *include, str(source), "-o", str(made)]
        subprocess.run([*command, *libraries, "-lc10"], check=True)
        made.rename(library)  # workers of a test run may build at once
        source.unlink()
    ctypes.CDLL(str(library)).install()
