"""Fused layers compute what the layers of transformers compute, in fewer kernels."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from slow_cases import slow
from tiny_families import build, small_configs
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from megakd.config.sections import TrainConfig
from megakd.data.batch import Pass
from megakd.errors import ConfigError
from megakd.models import fused_layers
from megakd.models.fused_layers import check_fused_layers, fuse_layers, fused_forwards
from megakd.models.units import InDouble
from megakd.models.views import View
from megakd.stage import Constant, Stage
from megakd.training.precision import choice_of

# torch looks at the gradient of every input of a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")

IDS = torch.arange(24).reshape(2, 12) * 7 % 400 + 5
EMPTY = ("_unsafe_view", "empty", "detach")
"""Parts of the names of operators without a kernel, beside those of views."""


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile without generating code, which takes a minute: the graphs are the same."""
    use_backend(monkeypatch, "aot_eager")


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=backend))


COMPILE = torch.compile


def tiny(family: str) -> Any:
    return build(next(small_configs(family, "causal_lm")), "causal_lm")


def fused(model: Any) -> Any:
    model = copy.deepcopy(model)
    for part, forward in fused_forwards(model).items():
        part.forward = forward.__get__(part)
    return model


def gradients(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).to(dtype)
    with InDouble() if dtype is torch.float64 else nullcontext():
        logits = model(input_ids=IDS, use_cache=False).logits
        weights = torch.arange(logits.numel()).sin().reshape(logits.shape)
        (logits * weights.to(logits.dtype)).sum().backward()
    named = model.named_parameters()
    return {name: p.grad.double() for name, p in named if p.grad is not None}


def error(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert actual.keys() == exact.keys()
    return max(((actual[n] - g).norm() / g.norm()).item() for n, g in exact.items())


# What each family fuses: norms, gated MLPs, attentions that rotate.
FAMILIES = [("llama", 5, 2, 2), ("gemma3_text", 13, 2, 2)]
SLOW = [("qwen3", 9, 2, 2), ("mistral", 5, 2, 2), ("granite", 5, 2, 2), ("phi3", 5, 0, 2)]
SLOW += [("olmo2", 9, 2, 2), ("gpt_neox", 0, 0, 2)]


@pytest.mark.parametrize(("family", "norms", "products", "rotations"), [*FAMILIES, *slow(*SLOW)])
def test_gradients_are_as_near_to_fp64_as_those_of_the_plain_layers(
    family, norms, products, rotations
):
    plain = tiny(family)
    model = fused(plain)
    kinds = Counter(type(part).__name__ for part in model.modules() if "forward" in vars(part))

    def of(*ends: str) -> int:
        return sum(count for kind, count in kinds.items() if kind.endswith(ends))

    assert (of("Norm"), of("MLP"), of("Attention")) == (norms, products, rotations)
    exact = gradients(plain, torch.float64)
    for dtype, most in ((torch.float32, 3e-6), (torch.bfloat16, 0.05)):
        of_plain, of_fused = (
            error(gradients(plain, dtype), exact),
            error(gradients(model, dtype), exact),
        )
        assert of_fused <= max(1.1 * of_plain, 1e-7), (dtype, of_fused, of_plain)
        assert of_fused < most


@pytest.mark.slow
def test_compiled_code_has_the_gradients_too(monkeypatch):
    use_backend(monkeypatch, "inductor")
    plain = tiny("llama")
    exact = gradients(plain, torch.float64)
    model = fused(plain)
    for dtype in (torch.float32, torch.bfloat16):
        of_plain = error(gradients(plain, dtype), exact)
        of_fused = error(gradients(model, dtype), exact)
        assert of_fused <= 1.2 * of_plain, (dtype, of_fused, of_plain)


class Kernels(TorchDispatchMode):
    """Counts the operators that start a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.counts = 0, True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else nothing is compiled inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        has_kernel = not func.is_view and not any(name in func.__name__ for name in EMPTY)
        self.count += has_kernel and self.counts
        return func(*args, **(kwargs or {}))

    def compiler(self, graph: Any, _: Any) -> Any:
        """A graph is one kernel; sums over other dimensions need one of their own."""
        sums = {
            str(node.args[1])
            for node in graph.graph.nodes
            if getattr(node.target, "__name__", "").startswith(("sum.", "mean."))
        }

        def run(*inputs: Any) -> Any:
            self.count += max(1, len(sums))
            with self._uncounted():
                return graph(*inputs)

        return make_boxed_func(run)

    @contextmanager
    def _uncounted(self) -> Any:
        before, self.counts = self.counts, False
        try:
            yield
        finally:
            self.counts = before


def kernels_per_layer(monkeypatch: pytest.MonkeyPatch, *, fuses: bool) -> tuple[int, int]:
    """Kernels of forward and backward of a layer: those of two layers less those of one."""
    counts = []
    for layers in (1, 2):
        mode = Kernels()
        use_backend(monkeypatch, aot_autograd(fw_compiler=mode.compiler, bw_compiler=mode.compiler))
        config = next(small_configs("llama", "causal_lm", layers=layers))
        model = build(config, "causal_lm").bfloat16().train()
        model = fused(model) if fuses else model
        model(input_ids=IDS, use_cache=False).logits.sum().backward()  # compiles
        model.zero_grad()
        mode.count = 0
        with mode:
            loss = model(input_ids=IDS, use_cache=False).logits.sum()
            forward = mode.count
            loss.backward()
        counts.append((forward, mode.count - forward))
    (one, one_back), (two, two_back) = counts
    return two - one, two_back - one_back


def test_a_layer_has_60_percent_fewer_kernels(monkeypatch):
    plain = kernels_per_layer(monkeypatch, fuses=False)
    few = kernels_per_layer(monkeypatch, fuses=True)

    def with_teacher(counts: tuple[int, int]) -> int:
        return 2 * counts[0] + counts[1]  # a teacher's layer has a forward alone

    assert with_teacher(few) <= 0.4 * with_teacher(plain)


def test_hooks_on_the_parts_of_a_fused_layer_are_called():
    model = fused(tiny("llama"))
    seen = Counter[str]()
    names = ("input_layernorm", "self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    for name in names:
        part = model.get_submodule(f"model.layers.0.{name}")
        part.register_forward_hook(lambda *_, name=name: seen.update([name]))

    model(input_ids=IDS, use_cache=False)

    assert seen == dict.fromkeys(names, 1)


class Gated(nn.Module):
    """A gated MLP with one thing more, which only some instances have."""

    def __init__(self, **constants: Any) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.act = nn.SiLU()
        plain = {"_limit": None, "scale": 1.0, "p": 0.0, "cuts": False, "wide": False}
        vars(self).update(plain | constants)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate(x), self.up(x)
        if self._limit is not None:
            gate, up = gate.clamp(max=self._limit), up.clamp(-self._limit, self._limit)
        inner = self.act(gate.detach() if self.cuts else gate) * up
        outputs = self.down(nn.functional.dropout(inner, self.p, self.training)) * self.scale
        return outputs.double() / 3 if self.wide else outputs


def test_only_the_instances_that_compute_a_product_are_fused():
    others = ({"_limit": 7.0}, {"_limit": 5000.0}, {"scale": 0.5}, {"p": 0.1})
    others = (*others, {"cuts": True}, {"wide": True})
    parts = nn.ModuleList([Gated(layer_idx=1), *(Gated(**one) for one in others), Gated()])
    plain, kept = {}, torch.get_rng_state()

    forwards = fused_forwards(parts, lambda product: plain.setdefault(product, product))

    assert [part in forwards for part in parts] == [True, *[False] * len(others), True]
    assert len(plain) == 1  # what is compiled is shared
    assert torch.equal(torch.get_rng_state(), kept)
    inputs = torch.randn(2, 3, 6)
    assert torch.equal(forwards[parts[0]](parts[0], x=inputs), parts[0](inputs))


def test_instances_with_other_activations_have_products_of_their_own():
    parts = nn.ModuleList([Gated(), Gated()])
    parts[1].act = nn.Tanh()

    forwards = fused_forwards(parts, lambda product: product)

    inputs = torch.randn(3, 6)
    assert all(torch.equal(forwards[part](part, inputs), part(inputs)) for part in parts)


CUDA = torch.device("cuda")


def source_of(family: str) -> Any:
    config = next(small_configs(family, "causal_lm"))
    return SimpleNamespace(config=config, where="student.model")


def test_a_model_without_such_layers_is_refused_before_it_is_loaded():
    check_fused_layers(source_of("llama"), "causal_lm")
    with pytest.raises(ConfigError, match=r"^train.fused_layers: on: the gpt2 model of student"):
        check_fused_layers(source_of("gpt2"), "causal_lm")


@pytest.mark.parametrize(
    ("family", "compiles", "reason"),
    [("gpt2", True, "it has no RMSNorm"), ("llama", False, "torch.compile fails on cuda: no g++")],
)
def test_what_cannot_be_fused_is_refused(monkeypatch, family, compiles, reason):
    def compiled(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\ng++")

    problem = None
    if not compiles:
        monkeypatch.setattr(torch, "compile", compiled)
        problem = fused_layers.why_not_compiled.__wrapped__(CUDA)
    monkeypatch.setattr(fused_layers, "why_not_compiled", lambda _: problem)
    monkeypatch.setattr(fused_layers, "gather", lambda value: [None, value])
    model, source = tiny(family), source_of(family)

    with pytest.raises(ConfigError, match=reason):
        fuse_layers(model, source, CUDA)

    assert not any("forward" in vars(part) for part in model.modules())


def test_the_log_counts_the_parts_that_are_fused(monkeypatch, caplog):
    monkeypatch.setattr(fused_layers, "gather", lambda value: [value])
    model, source, cpu = tiny("llama"), source_of("llama"), torch.device("cpu")
    with caplog.at_level(logging.INFO, "megakd"):
        fuse_layers(model, source, cpu)
    parts = "2 LlamaAttention, 2 LlamaMLP, 5 LlamaRMSNorm"
    assert caplog.messages == [f"student.model: fused (train.fused_layers): {parts}"]


def test_a_stage_with_views_has_plain_layers():
    def stage(choice: Any, **keys: Any) -> Any:
        train = TrainConfig(fused_layers=choice)
        strategy = Constant((Pass(),))
        return Stage(
            name="student", teachers=(), objective=(), strategy=strategy, train=train, **keys
        )

    views = {"small": View(heads=(1,), neurons=(2,))}
    assert choice_of(stage("on")) == "on"
    assert choice_of(stage("auto", views=views)) == "off"
    with pytest.raises(ConfigError, match="the stage student trains parts of its student"):
        choice_of(stage("on", views=views))
