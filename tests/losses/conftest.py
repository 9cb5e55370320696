"""What loss tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import megakd_kernels

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """Notes tensors and options of every call of the named kernels from now on."""

    def noting(*names: str) -> Calls:
        calls: Calls = []
        for name in names:
            real = getattr(megakd_kernels, name)

            def noted(*tensors: Any, real: Any = real, **options: Any) -> Any:
                calls.append((tensors, options))
                return real(*tensors, **options)

            monkeypatch.setattr(megakd_kernels, name, noted)
        return calls

    return noting
