"""Small problems for the losses, and how far two results are apart."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megakd_kernels as mk
from megakd_kernels.settings import HAS_TRITON

INTERPRET = "TRITON_INTERPRET"
# Processes of pytest-xdist inherit what this file has set in the process that started them.
SET_HERE = "MEGAKD_TESTS_SET_TRITON_INTERPRET"
IS_FREE = INTERPRET not in os.environ or SET_HERE in os.environ
NEEDS_INTERPRETER = not torch.cuda.is_available() and IS_FREE
# Triton decides when a kernel is defined whether its interpreter runs it: the test modules, which
# come next, define them.
if NEEDS_INTERPRETER:
    os.environ[INTERPRET] = os.environ[SET_HERE] = "1"


def pytest_collection_finish():
    """Other tests of the session run without the interpreter, as users do."""
    if NEEDS_INTERPRETER:
        os.environ.pop(INTERPRET, None)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if NEEDS_INTERPRETER:
        monkeypatch.setenv(INTERPRET, "1")


def pytest_collection_modifyitems(items):
    """Skip the cases of Triton without it, and on a GPU those whose tensors are on the CPU."""
    for item in items:
        if not getattr(item, "callspec", None) or item.callspec.params.get("impl") != "triton":
            continue
        if not HAS_TRITON:
            item.add_marker(pytest.mark.skip(reason="triton is not installed"))
        elif not (
            NEEDS_INTERPRETER or hasattr(item.module, "DEVICE") or "device" in item.fixturenames
        ):
            item.add_marker(pytest.mark.skip(reason="CPU tensors need Triton's interpreter"))


@pytest.fixture
def device(request):
    """For kernels the GPU, where there is one, else the CPU."""
    path = request.node.callspec.params.get("impl") if hasattr(request.node, "callspec") else None
    return "cuda" if path == "triton" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Problem:
    """Two LM heads over a few rows; two rows are ignored."""

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    labels: torch.Tensor
    student_bias: torch.Tensor | None = None

    def to(self, place):
        """A copy on a device, or with a dtype, which the labels do not take."""
        tensors = {
            name: value.to(place)
            for name, value in vars(self).items()
            if value is not None and (name != "labels" or isinstance(place, str))
        }
        return replace(self, **tensors)

    def leaves(self):
        tensors = (self.student_hidden, self.student_weight, self.student_bias)
        return [None if leaf is None else leaf.detach().requires_grad_() for leaf in tensors]

    def loss(self, hidden, weight, bias=None, **options):
        options = {"t_squared": True, "labels": self.labels, "student_bias": bias, **options}
        return mk.linear_kd_loss(
            hidden, weight, self.teacher_hidden, self.teacher_weight, **options
        )

    def solve(self, *, upstream=1.0, **options):
        """The output, and the gradients of hidden states, weight and bias."""
        leaves = self.leaves()
        output = self.loss(*leaves, **options)
        present = [leaf for leaf in leaves if leaf is not None]
        return output, torch.autograd.grad(output.loss * upstream, present)


def check_same_values(got, expected):
    """Check the results of two variants of a kernel, which a GPU's compiler rounds differently."""
    on_gpu = torch.cuda.is_available()
    tolerances = {"rtol": 3e-6, "atol": 1e-7} if on_gpu else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerances)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation has.

    A mode does not see into an operator of torch: call its function, `operator._init_fn`.
    """

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.fixture
def largest_tensor():
    return LargestTensor


@pytest.fixture
def same_values():
    return check_same_values


@pytest.fixture
def make_problem():
    def make(n=13, vs=37, vt=37, hs=6, ht=9, *, dtype=torch.float32, seed=0, bias=False):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        labels = torch.randint(0, min(vs, vt), (n,), generator=generator)
        labels[2::7] = -100
        problem = Problem(
            random(n, hs), random(vs, hs), random(n, ht), random(vt, ht) * 0.8, labels,
            random(vs) if bias else None,
        )  # fmt: skip
        return problem.to(dtype)

    return make


@pytest.fixture
def distance():
    """Norm of the difference over the norm of `expected`, 0 where both are zero."""

    def relative(got, expected):
        difference = (got.double() - expected.double()).norm()
        return (difference / expected.double().norm().clamp(min=1e-300)).item()

    return relative


@dataclass(frozen=True)
class Cached:
    """A student and what is kept of a teacher; rows 2 and 9 are ignored."""

    hidden: torch.Tensor
    weight: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor
    labels: torch.Tensor
    bias: torch.Tensor

    def to(self, dtype):
        tensors = {name: getattr(self, name).to(dtype) for name in ("hidden", "weight", "bias")}
        return replace(self, **tensors)

    def leaves(self):
        return [leaf.detach().requires_grad_() for leaf in (self.hidden, self.weight, self.bias)]

    def loss(self, leaves, **options):
        options = {"t_squared": True, "labels": self.labels, **options}
        cache = (options.pop("ids", self.ids), options.pop("logprobs", self.logprobs))
        return mk.topk_kd_loss(*leaves[:2], *cache, student_bias=leaves[2], **options)

    def solve(self, **options):
        """The output, and the gradients of hidden states, weight and bias."""
        leaves = self.leaves()
        output = self.loss(leaves, **options)
        return output, torch.autograd.grad(output.loss, leaves)

    def truth(self, mode, *, temperature=1.0, ce_weight=0.0):
        """Loss and gradients, eager fp64: the formulas as they are written."""
        leaves = self.to(torch.float64).leaves()
        logits = leaves[0] @ leaves[1].T + leaves[2]
        valid = (self.labels != -100).nonzero().squeeze(1)
        loss = 0
        for row in valid.tolist():
            there = self.ids[row] >= 0
            chosen = self.ids[row][there]
            p = self.logprobs[row][there].double().exp()
            scaled = logits[row] / temperature
            if mode == "renorm":
                p = p ** (1 / temperature)
                p = p / p.sum()
            q = scaled.softmax(-1)[chosen]
            loss = loss + temperature**2 * (p * (p / q).log()).sum()
            if mode == "tail":
                rest = 1 - p.sum()
                loss = loss + rest * (rest / (1 - q.sum())).log()
            if ce_weight:
                ce = torch.nn.functional.cross_entropy(logits[row], self.labels[row])
                loss = loss + ce_weight * ce
        return loss, torch.autograd.grad(loss, leaves)


@pytest.fixture
def make_cached():
    def make(n=11, v=31, h=6, k=5, *, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden, weight, bias = random(n, h), random(v, h), random(v)
        # A teacher near the student, so that they often have the same most likely id.
        logits = hidden @ weight.T + bias + 2 * random(n, v)
        logprobs, ids = logits.log_softmax(-1).topk(k)
        labels = torch.randint(0, v, (n,), generator=generator)
        labels[2::7] = -100
        # Kept in fp32, or all in fp64; one row has a shorter list.
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        if k > 2 and n:
            ids[0, 2:] = -1
        return Cached(hidden, weight, ids, logprobs.to(kept), labels, bias).to(dtype)

    return make
