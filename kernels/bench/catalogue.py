"""All implementations: their losses, and the reasons why they cannot run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from bench.cases import Case, Device

LINEAR = ("linear_kd", "linear_ce", "linear_stats", "topk")
LOSSES = (*LINEAR, "logits", "hidden_mse", "hidden_cosine", "relation")
GKD = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Implementation:
    """One way to compute some of the losses.

    divergences: those it knows; None: all of them.
    mixes: whether it computes weighted sums of divergences, and adds cross-entropy.
    compiles: whether every new shape costs a compilation of many seconds.
    only: the one device on which it is measured.
    package: what must be installed, as (module, name to install).
    """

    name: str
    about: str
    kinds: tuple[str, ...]
    divergences: tuple[str, ...] | None = None
    mixes: bool = True
    compiles: bool = False
    only: Device | None = None
    package: tuple[str, str] | None = None

    @property
    def is_ours(self) -> bool:
        """True if its failure is a failure of this repository."""
        return self.name.startswith("megakd")


_LIGER = ("liger_kernel", "liger-kernel")
_KD, _CE = ("linear_kd",), ("linear_ce",)
_ONLY = {"cuda": "runs on CUDA alone", "cpu": "an old version, measured on a CPU alone"}
IMPLEMENTATIONS = (
    Implementation("megakd-triton", 'this package, impl="triton"', (*LOSSES, "rows"), only="cuda"),
    Implementation("megakd-chunked", 'this package, impl="chunked": the same chunks, rows by torch',
                   LOSSES),
    Implementation("eager", "full logits in the dtype of the model, widened to fp32, as Hugging "
                   "Face's losses", LOSSES),
    Implementation("compile", "torch.compile of eager", LOSSES, compiles=True),
    Implementation("compile-max", 'compile in the mode "max-autotune-no-cudagraphs"', LOSSES,
                   compiles=True, only="cuda"),
    Implementation("trl-chunks", "256-row checkpointed chunks in fp32, as TRL 1.12 "
                   "(huggingface/trl#6526)", _KD, divergences=GKD, mixes=False,
                   only="cpu"),
    Implementation("trl-tiles", "trl.kernels.ChunkedDivergenceFunction of newer TRL: tiles, "
                   "recomputed", _KD, divergences=GKD, mixes=False,
                   package=("trl.kernels", "a newer trl")),
    Implementation("liger-jsd", "LigerFusedLinearJSD (Triton; gradients in the forward)", _KD,
                   divergences=GKD, mixes=False, only="cuda", package=_LIGER),
    Implementation("liger-jsd-fp32", "liger-jsd with accum_dtype=torch.float32, which sums the "
                   "head's gradient as ours does", _KD, divergences=GKD, mixes=False,
                   only="cuda", package=_LIGER),
    Implementation("liger-kl", "LigerFusedLinearKLDivLoss on the softmax of the teacher's whole "
                   "logits, in the dtype of the model", _KD, divergences=("forward_kl",),
                   mixes=False, only="cuda", package=_LIGER),
    Implementation("liger-chunked", "LigerFusedLinearJSDLoss (torch.compile of chunks; gradients "
                   "in the forward)", _KD, divergences=GKD, compiles=True, package=_LIGER),
    Implementation("liger-ce", "LigerFusedLinearCrossEntropyLoss", _CE, only="cuda",
                   package=_LIGER),
    Implementation("cut-ce", "cut_cross_entropy.linear_cross_entropy, which leaves small gradients "
                   "out", _CE, only="cuda", package=("cut_cross_entropy", "cut-cross-entropy")),
    Implementation("quack-ce", "quack.linear_cross_entropy.chunked_linear_cross_entropy", _CE,
                   only="cuda", package=("quack", "quack-kernels")),
    Implementation("torch-ce", "torch.nn.functional.linear_cross_entropy, chunked", _CE),
    Implementation("megakd-gemms", "the matrix products of linear_kd_loss and nothing else",
                   ("gemms",)),
)  # fmt: skip


def find(name: str) -> Implementation:
    """The implementation of that name; KeyError if there is none."""
    return {each.name: each for each in IMPLEMENTATIONS}[name]


def computes(implementation: Implementation, case: Case) -> bool:
    """True if the implementation has the loss of the case."""
    return case.kind in implementation.kinds


def reason_to_skip(implementation: Implementation, case: Case, device: Device) -> str | None:
    """Why it cannot run a case whose kind of loss it knows, or None."""
    if implementation.only not in {None, device}:
        return _ONLY[implementation.only or device]
    if implementation.divergences is not None:
        unknown = [name for name, _ in case.mixture if name not in implementation.divergences]
        if unknown:
            return f"has no {' or '.join(unknown)}"
    is_mixed = len(case.mixture) > 1 or (case.ce_weight != 0 and case.kind == "linear_kd")
    if is_mixed and not (implementation.mixes and _mixes(implementation, case)):
        return f"computes no weighted sum {case.divergence}"
    return _missing_package(implementation)


def _mixes(implementation: Implementation, case: Case) -> bool:
    return implementation.divergences is None or len(case.mixture) == 1


def _missing_package(implementation: Implementation) -> str | None:
    if implementation.package is None:
        return None
    module, name = implementation.package
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        spec = None
    return None if spec else f"{name} is not installed"
