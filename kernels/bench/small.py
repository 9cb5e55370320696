"""Times losses of a few numbers on a CPU, where fixed costs count: `python -m bench.small`.

Prints the CPU time of forward and backward, one thread: the least of many short rounds, in which
the losses take turns, and the median over the rounds of `auto` over `eager`. On a machine that runs
other programs, the median includes the time that they cost. `eager` forms the loss alone;
`chunked` also forms sums, values per row and agreement. With `auto`, the loss of logits forms them
when one is read, which is not part of the time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import megakd_kernels as mk

_ROUNDS, _CALLS, _WARM_UP = 101, 40, 100
_LOGITS, _STATES = ((32, 2), (32, 150), (256, 64)), ((32, 64), (512, 64))


def main() -> int:
    """Print one row per loss and size."""
    torch.set_num_threads(1)
    print("| loss | size | auto, ms | chunked, ms | eager, ms | auto / eager |")
    print("|---|---|---|---|---|---|")
    for rows, columns in _LOGITS:
        _print("kd_loss_from_logits", rows, columns, _logits_losses(rows, columns))
    for rows, columns in _STATES:
        _print("hidden_mse", rows, columns, _state_losses(rows, columns))
    return 0


def _print(name: str, rows: int, columns: int, losses: list[Callable[[], object]]) -> None:
    rounds = _milliseconds(losses)
    ratio = statistics.median(auto / eager for auto, _, eager in zip(*rounds, strict=True))
    cells = [f"{min(times):.3f}" for times in rounds]
    print(f"| {name} | {rows} x {columns} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


def _logits_losses(rows: int, columns: int) -> list[Callable[[], object]]:
    student = torch.randn(rows, columns, requires_grad=True)
    teacher = torch.randn(rows, columns)

    def ours(impl: str) -> None:
        student.grad = None
        options = {"temperature": 2.0, "t_squared": True, "reduction": "mean", "impl": impl}
        mk.kd_loss_from_logits(student, teacher, **options).loss.backward()

    def eager() -> None:
        student.grad = None
        log_q, log_p = F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1)
        (4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")).backward()

    return [lambda: ours("auto"), lambda: ours("chunked"), eager]


def _state_losses(rows: int, columns: int) -> list[Callable[[], object]]:
    student = torch.randn(rows, columns, requires_grad=True)
    teacher, valid = torch.randn(rows, columns), torch.ones(rows, dtype=torch.bool)

    def ours(impl: str) -> None:
        student.grad = None
        mk.hidden_mse_projection_loss(student, None, teacher, valid=valid, impl=impl).backward()

    def eager() -> None:
        student.grad = None
        F.mse_loss(student[valid], teacher[valid], reduction="none").mean(-1).sum().backward()

    return [lambda: ours("auto"), lambda: ours("chunked"), eager]


def _milliseconds(calls: list[Callable[[], object]]) -> list[list[float]]:
    """Return the time of each call in each round."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls * _WARM_UP:
        call()
    for _ in range(_ROUNDS):
        for call, spent in zip(calls, times, strict=True):
            began = time.process_time()
            for _ in range(_CALLS):
                call()
            spent.append((time.process_time() - began) / _CALLS * 1000)
    return times


if __name__ == "__main__":
    sys.exit(main())
