"""Cases: a loss, its shapes and its options. Imports no torch, so that listing is fast.

Shapes: N rows (positions), V ids, Hs and Ht widths of student and teacher, L positions of a
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal[
    "linear_kd", "linear_ce", "linear_stats", "topk", "logits", "rows", "gemms",
    "hidden_mse", "hidden_cosine", "relation",
]  # fmt: skip
Selection = Literal["quick", "full", "named"]
Device = Literal["cpu", "cuda"]

BETA = 0.5  # of jsd
SKEW = 0.1  # of skew_kl and skew_rkl
TOP_K = 64
ACCEPTANCE = "forward_kl"
VOCABULARIES = (32000, 128256, 151936, 256000)
WIDTHS = ((1024, 4096), (2048, 4096), (2048, 8192))
ROWS = (2048, 8192, 16384)
_TWO_READS = ("forward_kl", "reverse_kl")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loss at one shape; the name is unique on its device.

    n: rows, or positions L of the one sequence of a relation.
    mixture: divergences and their weights; empty where the loss has none.
    mode: "fwd_bwd", or "fwd" for the loss alone, without gradient.
    selection: "quick" runs always, "full" without --quick, "named" only when asked for.
    """

    name: str
    kind: Kind
    n: int
    v: int
    hs: int
    ht: int
    dtype: str = "bf16"
    mixture: tuple[tuple[str, float], ...] = (("forward_kl", 1.0),)
    ce_weight: float = 0.0
    temperature: float = 1.0
    heads: int = 32
    mode: Literal["fwd_bwd", "fwd"] = "fwd_bwd"
    selection: Selection = "full"

    @property
    def divergence(self) -> str:
        """Name of the loss in the table, such as "forward_kl + ce"."""
        names = [name for name, _ in self.mixture]
        return " + ".join([*names, "ce"] if self.ce_weight else names)

    def cut(self, rows: int) -> Case:
        """Return the case with fewer rows."""
        return replace(self, n=min(self.n, rows))


def floating_point_operations(case: Case) -> int:
    """Operations of the matrix products that the exact loss needs (README.md, the table of floors).

    2NV(3Hs + Ht) with gradients, 2NV(Hs + Ht) without; a relation counts its products a second
    time for the gradient, since nothing of size L x L is kept.
    """
    n, v, hs, ht = case.n, case.v, case.hs, case.ht
    with_gradient = case.mode == "fwd_bwd"
    if case.kind in {"rows", "logits"}:
        return 0
    if case.kind in {"hidden_mse", "hidden_cosine"}:
        return (6 if with_gradient else 2) * n * hs * ht
    if case.kind == "relation":
        forward = 2 * n * n * (hs + ht)
        return 2 * forward + 2 * n * n * hs if with_gradient else forward
    teacher = ht if case.kind in {"linear_kd", "linear_stats", "gemms"} else 0
    return 2 * n * v * ((3 if with_gradient else 1) * hs + teacher)


def bytes_moved(case: Case) -> int:
    """Bytes of the loss between given logits: fp32 read twice or three times, the gradient written.

    0 for every other loss, whose floor is its products'.
    """
    if case.kind not in {"rows", "logits"}:
        return 0
    reads = 2 if all(name in _TWO_READS for name, _ in case.mixture) else 3
    written = {"bf16": 2, "fp32": 4}[case.dtype] if case.mode == "fwd_bwd" else 0
    return case.n * case.v * (reads * 2 * 4 + written)


def cases_for(device: Device) -> tuple[Case, ...]:
    """In the order in which they run."""
    return _cuda_cases() if device == "cuda" else _cpu_cases()


def _cuda_cases() -> tuple[Case, ...]:
    quick = Case(
        name=ACCEPTANCE, kind="linear_kd", n=8192, v=128256, hs=2048, ht=4096, selection="quick"
    )
    full = replace(quick, selection="full")
    rows = replace(quick, name="rows", kind="rows")
    shapes = ((v, hs, ht, n) for v in VOCABULARIES for hs, ht in WIDTHS for n in ROWS)
    return (
        quick,
        rows,
        replace(quick, name="gemms", kind="gemms"),
        replace(quick, name="relation", kind="relation", n=4096, v=0, mixture=()),
        replace(quick, name="jsd", mixture=(("jsd", 1.0),)),
        *_variants(quick, full),
        replace(rows, name="rows-jsd", mixture=(("jsd", 1.0),), selection="full"),
        replace(full, name="logits", kind="logits", n=2048),
        *(_shaped(full, *one) for one in shapes if one != (full.v, full.hs, full.ht, full.n)),
    )


def _variants(quick: Case, full: Case) -> tuple[Case, ...]:
    """Other losses and options at the shape of `quick`; what `--quick` can spare is `full`."""
    kl = {"forward_kl": 0.5, "reverse_kl": 0.5}
    others = ("reverse_kl", "skew_kl", "skew_rkl", "tvd")
    return (
        *(replace(full, name=name, mixture=((name, 1.0),)) for name in others),
        replace(full, name="mixture", mixture=tuple(kl.items()), ce_weight=1.0),
        replace(full, name="forward_kl-t2", temperature=2.0),
        replace(full, name="forward_kl-loss", mode="fwd"),
        replace(quick, name="ce", kind="linear_ce", ht=0, mixture=(), ce_weight=1.0),
        replace(quick, name="stats", kind="linear_stats", ce_weight=1.0, mode="fwd"),
        replace(quick, name="topk", kind="topk", ht=0),
        replace(quick, name="hidden_mse", kind="hidden_mse", v=0, mixture=()),
        replace(full, name="hidden_cosine", kind="hidden_cosine", v=0, mixture=()),
    )


def _shaped(like: Case, v: int, hs: int, ht: int, n: int) -> Case:
    return replace(like, name=f"v{v}-h{hs}x{ht}-n{n}", v=v, hs=hs, ht=ht, n=n, selection="full")


def _cpu_cases() -> tuple[Case, ...]:
    first = Case(
        name=ACCEPTANCE, kind="linear_kd", n=1024, v=32000, hs=256, ht=512, dtype="fp32",
        selection="quick",
    )  # fmt: skip
    small = replace(first, n=256, v=8000, hs=128, ht=256)
    smoke = replace(first, n=24, v=96, hs=8, ht=16, selection="named")
    return (
        first,
        replace(small, name="logits", kind="logits"),
        replace(small, name="gemms", kind="gemms"),
        replace(small, name="relation", kind="relation", n=512, v=0, mixture=(), heads=8),
        replace(small, name="jsd", mixture=(("jsd", 1.0),)),
        *_variants(small, replace(small, selection="full")),
        _shaped(first, 32000, 256, 512, 256),
        _shaped(first, 32000, 512, 1024, 512),
        _shaped(first, 50304, 256, 512, 512),
        replace(smoke, name="smoke"),
        replace(smoke, name="smoke-relation", kind="relation", v=0, mixture=(), heads=2),
    )  # fmt: skip
