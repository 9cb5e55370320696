"""Answers of all ranks to questions in a step, without an additional collective or device sync.

The answers of every rank are sent together with the unit counts of a step, which are summed over
the ranks anyway. The sums are copied to the host during the step and read when all kernels of the
step have been launched. The accelerator still has the whole step to compute at that time, so that
reading the sums causes no idle time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megakd.contract.batch import Counts
from megakd.engine.collectives import all_reduce_, gather
from megakd.process import signals


class StepVotes:
    """Questions that each rank answers in every step; all ranks know if any rank said yes.

    questions: by name; each is asked when the counts of a step are summed.
    """

    def __init__(self, questions: Mapping[str, Callable[[], bool]]) -> None:
        self._questions = questions
        self._flags: tuple[Tensor, ...] | None = None
        self._votes: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def sum_counts(self, counts: Counts) -> Counts:
        """Return the counts summed over the ranks, and sum the answers of the ranks with them."""
        device = next(iter(counts.values())).device
        if self._flags is None:  # made once: a step must not copy from the host
            self._flags = torch.tensor([0, 1], device=device).unbind()
        answers = [self._flags[int(ask())] for ask in self._questions.values()]
        sums = all_reduce_(torch.stack([*counts.values(), *answers]))
        self._votes = sums[len(counts) :].to("cpu", non_blocking=True)
        if sums.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return dict(zip(counts, sums.unbind(), strict=False))

    def any(self, name: str) -> bool:
        """Return whether any rank said yes in the last step; False before the first step."""
        if self._votes is None:
            return False
        if self._copied is not None:
            self._copied.synchronize()
        return self._votes[[*self._questions].index(name)].item() > 0


def agreed_signal() -> int:
    """Return the stop signal that any rank has received, or 0; a collective."""
    return max(gather(signals.requested()))
