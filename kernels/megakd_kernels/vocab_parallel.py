"""Rows whose vocabulary is spread over the ranks of a process group (tensor parallelism).

Every rank has the same rows and its own range of consecutive ids, which is the same for student
and teacher. Three small collectives per chunk join the row maxima, sums and means of the parts.
The ranks first agree on the rows of a chunk. Everything else is local: the gradient of a rank's
weight shard needs no communication, and the gradient of the hidden states is summed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d

from megakd_kernels.inputs import may_look_at, shared_vocabulary


class GroupReduce:
    """Reductions that join the parts of a row over a process group, given by name."""

    def __init__(self, name: str) -> None:
        # Operators take the name of a process group, not the group.
        self._group = _group_named(name)

    def maxima(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the elementwise maxima over the ranks, in one collective."""
        return self._joined(values, distributed.ReduceOp.MAX)

    def totals(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the elementwise sums over the ranks, in one collective."""
        return self._joined(values, distributed.ReduceOp.SUM)

    def _joined(
        self, values: Sequence[Tensor], operation: distributed.ReduceOp.RedOpType
    ) -> Sequence[Tensor]:
        joined = torch.stack([value.to(values[0].dtype) for value in values])
        distributed.all_reduce(joined, op=operation, group=self._group)
        return joined.unbind(0)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Slice of the vocabulary on this rank: `ids` ids of the student, beginning at `start`.

    ValueError if the first id is negative, or is not 0 without a group.

    group: the ranks that hold the other ids; None if this rank holds all ids.
    limit: number of shared ids of the whole vocabulary; None: all ids that both models have.
    """

    ids: int
    start: int = 0
    limit: int | None = None
    group: distributed.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.start and self.group is None):
            raise ValueError(
                f"vocab_start is {self.start}: it must be 0 or more, and 0 without a process_group"
            )

    @property
    def operator(self) -> tuple[int, str]:
        """First id and group name, as operators take them."""
        return self.start, "" if self.group is None else self.group.group_name

    @property
    def named(self) -> str:
        """Description of this rank's ids for messages."""
        here = f"{self.start} to {self.start + self.ids - 1}"
        return here if self.group is None else f"{here} on this rank"

    def shared(self, teacher_ids: int | None) -> int:
        """Return the number of this rank's ids that both softmaxes run over."""
        if teacher_ids is None:
            return self.ids
        if self.group is None:
            return shared_vocabulary(self.ids, teacher_ids, self.limit)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"vocab_size {self.limit} must be at least 1")
        shared = min(self.ids, teacher_ids)
        return shared if self.limit is None else max(0, min(shared, self.limit - self.start))

    def known(self, labels: Tensor) -> Tensor:
        """Return [N] bool: whether each label is an id of the student, on any rank."""
        is_here = (labels >= self.start) & (labels < self.start + self.ids)
        if self.group is None:
            return is_here
        holders = is_here.to(torch.int32)
        distributed.all_reduce(holders, group=self.group)
        if may_look_at(holders) and bool((holders > 1).any()):
            raise ValueError(
                f"label {int(labels[holders > 1][0])} is an id of several ranks: the slices "
                f"overlap, {self.named}; vocab_start is the first id of a rank's slice"
            )
        return holders > 0


def _group_named(name: str) -> distributed.ProcessGroup:
    # torch's functional collectives find their groups with this function.
    return distributed_c10d._resolve_process_group(name)  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]
