"""Compiles every Triton kernel for sm_90, as the public functions launch it, without a GPU.

The interpreter is blind to types and constants that the compiler refuses. Prints the most shared
memory that a kernel asks for, and how many variants were compiled. Run by `test_triton_compiles`.
"""

import importlib
import os
import pkgutil
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import megakd_kernels as mk
from megakd_kernels import triton as kernels
from megakd_kernels.row_plan import RowInputs, RowPlan
from megakd_kernels.triton import row_hidden
from megakd_kernels.triton.row_kd import TritonRows

ALL = dict.fromkeys(mk.DIVERGENCES, 0.5)
COMPILED = {}


class AbsentGpu:
    """Answers what the compiler asks of a driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_instead_of_launching():
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    driver.set_active(AbsentGpu())
    launch = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        del warmup
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        COMPILED[kernel.hash] = kernel.metadata.shared
        return kernel

    JITFunction.run = compile_only
    # The kernels are defined by now; this only lets CPU tensors through.
    os.environ["TRITON_INTERPRET"] = "1"


def compile_heads(dtype):
    """The losses on two LM heads; 2048 ids make whole blocks."""
    hidden, weight = torch.zeros(16, 64, dtype=dtype), torch.zeros(2048, 64, dtype=dtype)
    labels, options = torch.zeros(16, dtype=torch.int64), {"t_squared": False, "impl": "triton"}
    heads = (hidden.requires_grad_(), weight, hidden.detach(), weight)
    mk.linear_kd_loss(*heads, labels, divergence=ALL, ce_weight=1.0, temperature=2.0, **options)
    mk.linear_kd_loss(*heads, softcap_s=30.0, logit_scale_t=0.5, **options)
    mk.linear_stats(hidden.detach(), weight, hidden.detach(), weight, labels, impl="triton")
    ids = torch.arange(8).repeat(16, 1)
    cached = (ids, torch.full((16, 8), -3.0))
    mk.topk_kd_loss(hidden, weight, *cached, labels, mode="tail", ce_weight=1.0, **options)


def compile_narrow_gradients():
    """What CUDA runs for bf16: fp32 logits, a bf16 gradient elsewhere."""
    logits = torch.zeros(4, 4096)
    valid, factor = torch.ones(4, dtype=torch.bool), torch.ones(4)
    inputs = RowInputs(valid, None, factor, factor)
    for name in ("forward_kl", "jsd"):
        plan = RowPlan(
            mixture=((name, 1.0),), beta=0.5, skew=0.1, temperature=1.0, value_scale=1.0,
            shared=4096, with_ce=False, with_gradient=True,
        )  # fmt: skip
        TritonRows(plan=plan).run_(logits, logits, inputs, logits.bfloat16())
    for rows in (row_hidden.squared_error_rows, row_hidden.one_minus_cosine_rows):
        rows(torch.zeros(4, 4096), torch.zeros(4, 4096), valid)


def compile_relations(dtype):
    states = torch.zeros(1, 64, 256, dtype=dtype).requires_grad_()
    keys = torch.zeros(1, 64, 256, dtype=dtype).requires_grad_()
    teacher, valid = torch.zeros(1, 64, 512, dtype=dtype), torch.ones(1, 64, dtype=torch.bool)
    options = {"heads": 4, "valid": valid, "impl": "triton", "causal": True}
    mk.relation_kl_loss(states, teacher, **options).backward()
    segments = torch.zeros(1, 64, dtype=torch.int64)
    mk.relation_kl_loss(states, teacher, keys, teacher, segments=segments, **options).backward()


if __name__ == "__main__":
    compile_instead_of_launching()
    compile_heads(torch.bfloat16)
    compile_narrow_gradients()
    compile_relations(torch.bfloat16)
    sys.stdout.write(f"{max(COMPILED.values())} {len(COMPILED)}")
