"""From the name of an implementation to its loss: ours, and those of other packages.

All are means over rows, without T^2. A loader raises ImportError where the package, or the part of
it, is missing.
"""

from __future__ import annotations

import importlib
from functools import partial

import torch
from torch import Tensor, nn

from bench import eager, ours
from bench.cases import BETA, Case
from bench.problem import Loss, Problem

_OURS = {"megakd-triton": "triton", "megakd-chunked": "chunked", "megakd-gemms": "auto"}
_LIGER_ROWS = 1024  # the default chunk of LigerFusedLinearJSDLoss


def load(name: str, case: Case) -> Loss:
    """The loss of the case by the implementation of that name."""
    impl = _OURS.get(name)
    return _LOADERS[name](case) if impl is None else ours.load(case, impl)


def _gkd_beta(case: Case) -> float:
    """GKD's convention, which TRL and Liger share: 0 is forward KL, 1 is reverse KL."""
    name, _ = case.mixture[0]
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}[name]


def _trl_tiles(case: Case) -> Loss:
    divergence = importlib.import_module("trl.kernels.chunked_divergence")
    function, beta = divergence.ChunkedDivergenceFunction, _gkd_beta(case)
    return lambda problem: function.apply(
        problem.student, problem.student_weight, None, problem.teacher, problem.teacher_weight,
        None, beta, case.temperature,
    )[0].mean()  # fmt: skip


def _liger_jsd(case: Case, accum_dtype: torch.dtype | None = None) -> Loss:
    transformers = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    loss = transformers.LigerFusedLinearJSD(
        jsd_beta=_gkd_beta(case), temperature=case.temperature, accum_dtype=accum_dtype
    )
    return lambda problem: loss(
        problem.student, problem.student_weight, problem.teacher, problem.teacher_weight, None
    )


def _liger_kl(case: Case) -> Loss:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_kl_div")
    loss = module.LigerFusedLinearKLDivLoss(temperature=case.temperature)

    def with_softmax(problem: Problem) -> Tensor:
        with torch.no_grad():
            logits = nn.functional.linear(problem.teacher, problem.teacher_weight)
            target = torch.softmax(logits.div_(case.temperature), dim=-1)
        return loss(problem.student, problem.student_weight, target)

    return with_softmax


def _liger_chunked(case: Case) -> Loss:
    chunked_loss = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    loss = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=case.ce_weight, weight_soft_loss=case.mixture[0][1],
        beta=_gkd_beta(case), temperature=case.temperature, chunk_size=_LIGER_ROWS,
    )  # fmt: skip
    return lambda problem: loss(
        problem.student, problem.student_weight, problem.teacher, problem.teacher_weight,
        problem.labels,
    )  # fmt: skip


def _liger_ce(case: Case) -> Loss:
    del case
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return lambda problem: loss(problem.student_weight, problem.student, problem.labels)


def _cut_ce(case: Case) -> Loss:
    del case
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda problem: loss(problem.student, problem.student_weight, problem.labels)


def _quack_ce(case: Case) -> Loss:
    del case
    loss = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda problem: loss(problem.student, problem.student_weight, problem.labels)


def _torch_ce(case: Case) -> Loss:
    del case
    loss = getattr(nn.functional, "linear_cross_entropy", None)
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if loss is None or options is None:
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    chunked = options()
    return lambda problem: loss(
        problem.student, problem.student_weight, problem.labels, options=chunked
    )


_LOADERS = {
    "eager": eager.load,
    "compile": eager.load_compiled,
    "compile-max": partial(eager.load_compiled, mode="max-autotune-no-cudagraphs"),
    "trl-chunks": eager.load_trl_chunks,
    "trl-tiles": _trl_tiles,
    "liger-jsd": _liger_jsd,
    "liger-jsd-fp32": partial(_liger_jsd, accum_dtype=torch.float32),
    "liger-kl": _liger_kl,
    "liger-chunked": _liger_chunked,
    "liger-ce": _liger_ce,
    "cut-ce": _cut_ce,
    "quack-ce": _quack_ce,
    "torch-ce": _torch_ce,
}
