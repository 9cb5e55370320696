"""Finds what would make the host wait for an accelerator, on a machine that has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READERS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Refuses to read a tensor on the host, and to look at what is read on a CPU alone."""
    with pytest.MonkeyPatch.context() as patch, Waiting():
        patch.setattr(Tensor, "is_cpu", False)
        for name in READERS:
            patch.setattr(Tensor, name, _refuse)
        yield


def _refuse(*_: Any) -> Any:
    raise AssertionError("a tensor was read on the host")


class Waiting(TorchDispatchMode):
    """Refuses every operation whose result the host would wait for on an accelerator."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        indices = [i for i in args[1] if i is not None] if name.startswith("index") else []
        if any(name.startswith(n) for n in self.NAMES) or _by_mask(indices):
            raise AssertionError(f"{name} makes the host wait")
        return func(*args, **(kwargs or {}))


def _by_mask(indices: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
