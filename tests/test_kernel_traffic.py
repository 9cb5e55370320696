"""Launches and bytes an element of the hidden-state losses, counted on a pretended GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pretend_cuda import CUDA, pretended_cuda
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from megakd_kernels import chunking, formed, hidden_ops
from megakd_kernels.triton import row_hidden

ROWS, STUDENT, TEACHER = 32768, 2048, 4096
NO_LAUNCH = {"empty", "empty_like", "new_empty", "permute", "slice", "t", "view", "unsqueeze"}


class Traffic(TorchDispatchMode):
    """Counts launches of torch and of row kernels, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.launches: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        made = sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if made and name not in NO_LAUNCH:
            # `new_zeros` only looks at its argument; an output that is given is no input.
            read = () if name == "new_zeros" else args
            self.add(name, [*tree_leaves(read), *tree_leaves(result)])
        return result

    def add(self, name: str, tensors: list[Any]) -> None:
        self.launches.append(name)
        self.bytes += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    def __getitem__(self, grid: Any) -> Any:
        def launch(projected: Tensor, target: Tensor, gradient: Tensor, *others: Any, **flags: Any):
            del others
            written = [gradient] if flags["WITH_GRADIENT"] else []
            self.add("kernel", [projected, target, *written])

        return launch


@pytest.fixture
def traffic(monkeypatch):
    counts = Traffic()
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(chunking, "_has_wide_results", lambda *_: True)
    monkeypatch.setattr(chunking, "_accumulates_narrow", lambda *_: True)
    for kernel in ("_squared_error_kernel", "_cosine_kernel"):
        monkeypatch.setattr(row_hidden, kernel, counts)
    with pretended_cuda():
        yield counts


def states(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def form(traffic: Traffic, kind: str, *, projection: Tensor | None, needed: list[bool]) -> Any:
    width = TEACHER if projection is None else STUDENT
    student, teacher = states(ROWS, width), states(ROWS, TEACHER)
    valid = states(ROWS, dtype=torch.bool)
    with traffic:
        return hidden_ops.hidden_loss._init_fn(
            student, projection, teacher, valid, needed, kind, "triton"
        )


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize(("has_gradient", "per_element"), [(True, 6), (False, 4)])
def test_states_of_equal_width_are_read_once_and_a_value_alone_writes_nothing(
    traffic, kind, has_gradient, per_element
):
    _, gradient, _ = form(traffic, kind, projection=None, needed=[has_gradient, False])

    assert traffic.bytes / (ROWS * TEACHER) == pytest.approx(per_element, rel=0.01)
    if has_gradient:
        assert sorted(traffic.launches) == ["kernel", "new_zeros", "sum"]
        assert (gradient.dtype, gradient.numel()) == (torch.bfloat16, ROWS * TEACHER)


def test_the_backward_of_bf16_states_reads_and_writes_them_once(traffic):
    gradient, upstream = states(ROWS, TEACHER), states(dtype=torch.float32)

    with traffic:
        scaled = formed._scaled(gradient, upstream, torch.bfloat16)

    assert traffic.launches == ["mul"]
    assert traffic.bytes / scaled.numel() == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_projected_states_are_formed_in_two_chunks_and_read_in_their_dtype(traffic, kind):
    projection = states(TEACHER, STUDENT)

    _, gradient, weight = form(traffic, kind, projection=projection, needed=[True, True])

    assert traffic.launches.count("kernel") == 2
    assert len(traffic.launches) == 20
    assert traffic.bytes / (ROWS * TEACHER) == pytest.approx(22, rel=0.05)
    assert (gradient.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
