"""Agreement of the ranks to stop, without an additional collective or device sync.

The flag of every rank is sent together with the unit counts of a step, which are summed over the
ranks anyway. The sum is copied to the host during the step and read when all kernels of the step
have been launched. The accelerator still has the whole step to compute at that time, so that
reading the sum causes no idle time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.contract.batch import Counts
from megakd.engine.collectives import all_reduce_, gather
from megakd.process import signals


class StopVote:
    """A vote that tells all ranks, at the end of the same step, that a rank has to stop."""

    def __init__(self) -> None:
        self._flags: Tensor | None = None
        self._votes: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def sum_counts(self, counts: Counts) -> Counts:
        """Return the counts summed over the ranks, and sum the votes of the ranks with them."""
        device = next(iter(counts.values())).device
        if self._flags is None:  # made once: a step must not copy from the host
            self._flags = torch.tensor([0, 1], device=device)
        vote = self._flags[int(signals.requested() > 0)]
        *summed, votes = all_reduce_(torch.stack([*counts.values(), vote])).unbind()
        self._votes = votes.to("cpu", non_blocking=True)
        if votes.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return dict(zip(counts, summed, strict=True))

    def passed(self) -> bool:
        if self._votes is None:
            return False
        if self._copied is not None:
            self._copied.synchronize()
        return self._votes.item() > 0


def agreed_signal() -> int:
    """Return the stop signal that any rank has received, or 0; a collective."""
    return max(gather(signals.requested()))
