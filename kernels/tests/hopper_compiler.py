"""Compiles every Triton kernel for sm_90, as the public functions launch it, without a GPU.

The interpreter is blind to types and constants that the compiler refuses. Prints one JSON object
per variant: name, shared memory, stack, and whether its products run on tensor cores. Run by
`test_triton_compiles`.
"""

import json
import sys

import torch

import megakd_kernels as mk
from bench.offline import compile_instead_of_launching
from bench.sass import examine
from megakd_kernels.row_plan import RowInputs, RowPlan
from megakd_kernels.triton import row_hidden
from megakd_kernels.triton.row_kd import TritonRows

ALL = dict.fromkeys(mk.DIVERGENCES, 0.5)
COMPILED = {}


def remember(name, kernel):
    COMPILED[kernel.hash] = name, kernel


def show():
    for name, kernel in COMPILED.values():
        facts = {
            "name": name, "shared": kernel.metadata.shared, "stack": examine(kernel).stack,
            "has_dot": "tt.dot" in kernel.asm["ttir"],
            "on_tensor_cores": "wgmma" in kernel.asm["ptx"],
        }  # fmt: skip
        sys.stdout.write(json.dumps(facts) + "\n")


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
    """The steps of CUDA for bf16: fp32 logits, a bf16 gradient elsewhere."""
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
    compile_instead_of_launching(remember)
    compile_heads(torch.bfloat16)
    compile_narrow_gradients()
    compile_relations(torch.bfloat16)
    show()
