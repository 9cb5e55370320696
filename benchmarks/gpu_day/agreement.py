"""Part of `gpu_day.py`: every loss with Triton against the reference, at a large vocabulary.

The inputs are those of `python -m bench`. Value and gradients of both implementations are compared
with fp64 from the same rounded inputs. A rehearsal uses Triton's interpreter and small shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpu_day.process import part_parser, say, skip

if TYPE_CHECKING:
    import torch

    from bench.cases import Case


LOSSES = (
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_rkl", "tvd", "mixture", "ce", "stats",
    "topk", "hidden_mse", "hidden_cosine", "relation", "logits",
)  # fmt: skip
REHEARSED = ("forward_kl", "jsd", "ce", "topk", "hidden_mse", "relation")
SHAPE = {"n": 512, "v": 128256, "hs": 256, "ht": 512}
SMALL = {"n": 8, "v": 512, "hs": 16, "ht": 32}
# Gradients of bf16 inputs are rounded to bf16: relative errors of up to 2**-8.
LARGEST_ERROR = {"loss": {"fp32": 1e-4, "bf16": 1e-4}, "gradient": {"fp32": 1e-4, "bf16": 1e-2}}


def main(arguments: Sequence[str]) -> int:
    given = part_parser(__doc__).parse_args(arguments)
    if given.rehearse:
        # Triton reads the variable when a kernel is defined.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from megakd_kernels.settings import HAS_TRITON

    if not HAS_TRITON:
        skip("triton is not installed")
    device = torch.device("cpu" if given.rehearse else "cuda")
    shape = SMALL if given.rehearse else SHAPE
    rows: list[dict[str, Any]] = []
    for case in cases(REHEARSED if given.rehearse else LOSSES, shape):
        rows.append(compared(case, device))
        holds = all(row["holds"] for row in rows)
        sizes = ", ".join(f"{key} = {size}" for key, size in shape.items())
        say({"all errors are small": holds, "shape": sizes, "relative errors against fp64": rows})
    return int(not all(row["holds"] for row in rows))


def cases(names: Sequence[str], shape: Mapping[str, int]) -> Iterator[Case]:
    """Yield the losses in bf16, and some of them in fp32."""
    from bench.cases import cases_for

    known = {case.name: case for case in cases_for("cuda")}
    for name in names:
        case = known[name]
        # A case without a vocabulary or without a teacher has a size of 0.
        sizes = {key: size for key, size in shape.items() if getattr(case, key)}
        small = replace(case, **sizes, heads=8)
        yield small
        if name in ("forward_kl", "jsd", "topk"):
            yield replace(small, dtype="fp32")


def compared(case: Case, device: torch.device) -> dict[str, Any]:
    """Return the errors of both implementations, and whether those of Triton are small enough."""
    from bench import ours
    from bench.accuracy import Truth
    from bench.problem import make_problem

    problem = make_problem(case, device)
    truth = Truth(problem)
    row: dict[str, Any] = {"loss": case.name, "dtype": case.dtype, "holds": True}
    for name in ("triton", "reference"):
        try:
            errors = truth.errors(ours.load(problem.case, name))
            row |= {f"{name} {key}": getattr(errors, key) for key in ("loss", "dx", "dw")}
        except Exception as error:  # noqa: BLE001 - the other losses must be compared too
            words = str(error).strip().splitlines() or [""]
            row |= {"failed": f"{name}: {type(error).__name__}: {words[0][:200]}", "holds": False}
    row["holds"] = row["holds"] and is_small(row, case.dtype)
    return row


def is_small(row: dict[str, Any], dtype: str) -> bool:
    """Return whether the errors of Triton are within the limits of the dtype; NaN is not."""
    kinds = {"loss": "loss", "dx": "gradient", "dw": "gradient"}
    return all(
        (error := row.get(f"triton {key}")) is None or error <= LARGEST_ERROR[kind][dtype]
        for key, kind in kinds.items()
    )
