"""Rows whose vocabulary is spread over the ranks of a process group (tensor parallelism).

Every rank has the same rows and consecutive ids of its own, cut alike for student and teacher.
Row maxima, sums and means of the parts are joined in three small collectives per chunk; all
else stays local: the gradient of a rank's weight shard needs no communication, that of the
hidden states is summed once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.distributed import distributed_c10d

from megakd_kernels.inputs import shared_vocabulary


class GroupReduce:
    """Joins the parts of a row over a process group, given by name."""

    def __init__(self, name: str) -> None:
        # Operators take no process group, only its name.
        self._group = _group_named(name)

    def maximum(self, values: Tensor) -> Tensor:
        """The elementwise maximum over the ranks."""
        return self._joined(values, distributed.ReduceOp.MAX)

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum over the ranks."""
        return self._joined(values, distributed.ReduceOp.SUM)

    def _joined(self, values: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        joined = values.contiguous().clone()
        distributed.all_reduce(joined, op=operation, group=self._group)
        return joined


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This rank's slice of the vocabulary: `ids` of the student's from `start` on.

    group: the ranks that hold the others; None where this rank holds all.
    limit: the whole vocabulary's shared ids; None: those both models have.
    """

    start: int
    ids: int
    limit: int | None
    group: distributed.ProcessGroup | None

    @property
    def operator(self) -> tuple[int, str]:
        """First id and the group's name, as operators take them."""
        return self.start, "" if self.group is None else self.group.group_name

    @property
    def named(self) -> str:
        """The ids this rank has, in words."""
        here = f"{self.start} to {self.start + self.ids - 1}"
        return here if self.group is None else f"{here} on this rank"

    def shared(self, teacher_ids: int | None) -> int:
        """How many of this rank's ids both softmaxes run over."""
        if teacher_ids is None:
            return self.ids
        if self.group is None:
            return shared_vocabulary(self.ids, teacher_ids, self.limit)
        shared = min(self.ids, teacher_ids)
        return shared if self.limit is None else max(0, min(shared, self.limit - self.start))

    def known(self, labels: Tensor) -> Tensor:
        """[N] bool: whether an id is the student's, on whichever rank."""
        is_here = (labels >= self.start) & (labels < self.start + self.ids)
        if self.group is None:
            return is_here
        found = is_here.to(torch.int32)
        distributed.all_reduce(found, group=self.group)
        return found > 0


def shard_of(
    group: distributed.ProcessGroup | None, start: int, ids: int, limit: int | None
) -> Shard:
    """The slice a caller describes.

    Raises:
        ValueError: a first id without a group, or a negative one.
    """
    if start < 0 or (start and group is None):
        raise ValueError(
            f"vocab_start is {start}: it must be 0 or more, and 0 without a process_group"
        )
    return Shard(start=start, ids=ids, limit=limit, group=group)


def _group_named(name: str) -> distributed.ProcessGroup:
    # torch's own functional collectives find their groups by this.
    return distributed_c10d._resolve_process_group(name)  # noqa: SLF001  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]
