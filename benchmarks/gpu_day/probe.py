"""Part of `gpu_day.py`: the rates that the expected times of the kernels hang on.

Products of the losses at their chunk sizes, with fp32 and bf16 results, sums of the head's
gradient, and the row kernels at aligned and odd vocabularies.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gpu_day.process import part_parser, say
from megakd_kernels.chunking import (
    add_weight_gradient_,
    input_gradient_into,
    logits_buffer,
    project_into,
)
from megakd_kernels.row_plan import RowInputs, RowPlan


class Probe:
    """Times functions and prints all rows after each."""

    def __init__(self, *, rehearse: bool) -> None:
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.runs = 1 if rehearse else 12
        self.rows: list[dict[str, Any]] = []

    def time(
        self, what: str, function: Callable[[], object], *, flop: float = 0.0, moved: float = 0.0
    ) -> None:
        row: dict[str, Any] = {"what": what}
        try:
            ms = self._median_ms(function)
            row |= {"ms": ms, "TFLOP/s": flop / ms / 1e9, "GB/s": moved / ms / 1e6}
        except (RuntimeError, TypeError, ValueError) as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        self.rows.append(row)
        say({"rates": self.rows})

    def _median_ms(self, function: Callable[[], object]) -> float:
        from bench.timing import Effort, sample_ms

        function()
        return statistics.median(sample_ms(function, self.device, Effort(0.0, self.runs)))

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)


def main(arguments: Sequence[str]) -> int:
    given = part_parser(__doc__).parse_args(arguments)
    small = given.rehearse
    if small:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    probe = Probe(rehearse=small)
    ids, widths, rows = (
        (512, (16, 32), (8,)) if small else (128256, (2048, 4096), (512, 1024, 2048))
    )
    for width in widths:
        products(probe, ids, width, rows)
    gradients(probe, ids, widths[0], (8,) if small else (1024, 2048, 4096, 8192))
    for vocabulary in (ids,) if small else (ids, 151665, 50257):
        row_kernels(probe, vocabulary, rows)
    return int(any("failed" in row for row in probe.rows))


def products(probe: Probe, ids: int, width: int, rows: Sequence[int]) -> None:
    weight = probe.random(ids, width)
    for count in rows:
        hidden, flop = probe.random(count, width), 2.0 * count * ids * width
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(count, ids, device=probe.device, dtype=dtype)
            about = f"logits, width {width}, {count} rows, {dtype}"
            probe.time(about, lambda h=hidden, o=out: project_into(o, h, weight, None), flop=flop)


def gradients(probe: Probe, ids: int, width: int, rows: Sequence[int]) -> None:
    weight = probe.random(ids, width)
    summed = torch.zeros(ids, width, device=probe.device)
    for count in rows:
        slope, hidden = probe.random(count, ids), probe.random(count, width)
        out, flop = torch.empty(count, width, device=probe.device), 2.0 * count * ids * width
        probe.time(
            f"dX, {count} rows",
            lambda s=slope, o=out: input_gradient_into(o, s, weight), flop=flop,
        )  # fmt: skip
        probe.time(
            f"dW, {count} rows, first",
            lambda s=slope, h=hidden: add_weight_gradient_(summed, s, h, is_first=True), flop=flop,
        )  # fmt: skip
        if probe.device.type == "cuda":
            probe.time(
                f"dW, {count} rows, added",
                lambda s=slope, h=hidden: add_weight_gradient_(summed, s, h), flop=flop,
            )  # fmt: skip


def row_kernels(probe: Probe, ids: int, rows: Sequence[int]) -> None:
    from megakd_kernels.triton.row_kd import TritonRows

    for name, reads in (("forward_kl", 2), ("reverse_kl", 2), ("jsd", 3)):
        plan = RowPlan(
            mixture=((name, 1.0),), beta=0.5, skew=0.1, temperature=1.0, value_scale=1.0,
            shared=ids, with_ce=False, with_gradient=True,
        )  # fmt: skip
        for count in rows:
            like = torch.empty(0, device=probe.device)
            student, teacher = (logits_buffer(count, ids, like) for _ in range(2))
            student.normal_().mul_(4)
            teacher.normal_().add_(student)
            gradient = logits_buffer(count, ids, like, torch.bfloat16)
            ones = torch.ones(count, device=probe.device)
            inputs = RowInputs(ones.bool(), None, ones, ones)
            probe.time(
                f"rows, {name}, V = {ids}, {count} rows",
                lambda s=student, t=teacher, i=inputs, g=gradient: TritonRows(plan=plan).run_(  # noqa: B023
                    s, t, i, g
                ),
                moved=count * ids * (8.0 * reads + 2),
            )
