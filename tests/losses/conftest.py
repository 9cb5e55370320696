"""What loss tests share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import megakd_kernels

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def noted(calls: Calls, kernel: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
    calls.append((tensors, options))
    return kernel(*tensors, **options)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Notes tensors and options of every call of the named kernels from now on."""

    def noting(*names: str) -> Calls:
        calls: Calls = []
        for name in names:
            kernel = partial(noted, calls, getattr(megakd_kernels, name))
            monkeypatch.setattr(megakd_kernels, name, kernel)
        return calls

    return noting
