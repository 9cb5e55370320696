"""vLLM's connector of hidden states, on a CPU: it asks for pinned memory and for CUDA streams.

vLLM imports this file in its own environment; see `kv_connector_module_path`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
)


class Done:
    """An event, or a stream, whose work is done when it is recorded."""

    def record(self, *_: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _unpinned(like: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.zeros_like(like)


class CpuStatesConnector(ExampleHiddenStatesConnector):
    """Copies the states at once, with the other code of vLLM as it is."""

    def _submit_async_write(self, pending: Any) -> None:
        with (
            patch("torch.cuda.Event", Done),
            patch("torch.cuda.Stream", Done),
            patch("torch.cuda.stream", lambda _: nullcontext()),
            patch("torch.empty_like", _unpinned),
        ):
            super()._submit_async_write(pending)
