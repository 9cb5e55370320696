"""Inputs and outputs of row kernels, which are written in torch or in Triton.

Shapes: R rows of a block, V ids; notation as in the public functions: q student, p teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Warp(NamedTuple):
    """Transform of raw logits z to the logits of the model: softcap * tanh(scale * z / softcap).

    softcap: 0 means no tanh.
    """

    scale: float = 1.0
    softcap: float = 0.0

    @property
    def is_identity(self) -> bool:
        """True if the logits are used unchanged."""
        return self.scale == 1.0 and self.softcap == 0.0


_AS_THEY_ARE = Warp()


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """Computation that a row kernel performs for every row.

    mixture: (divergence, weight) pairs; empty for only cross-entropy.
    beta: parameter of jsd, inside (0, 1). skew: of skew_kl and skew_rkl, inside (0, 1).
    value_scale: factor of the divergences (T^2 or 1).
    shared: number of ids that both models have, their first ids.
    """

    mixture: tuple[tuple[str, float], ...]
    beta: float
    skew: float
    temperature: float
    value_scale: float
    shared: int
    with_ce: bool
    with_gradient: bool
    student_warp: Warp = _AS_THEY_ARE
    teacher_warp: Warp = _AS_THEY_ARE

    def shares_softmax(self, width: int) -> bool:
        """Return whether cross-entropy (T = 1, every id) can use the softmax of the divergences."""
        return self.temperature == 1.0 and self.shared == width


class RowInputs(NamedTuple):
    """Inputs per row, each [R].

    valid: bool; rows that are False get a gradient of zeros.
    labels: int64 ids, or None.
    kd_factor, ce_factor: factors of the gradients of the two losses with respect to the
        student's logits; value_scale / temperature is part of kd_factor.
    """

    valid: Tensor
    labels: Tensor | None
    kd_factor: Tensor
    ce_factor: Tensor


class Biases(NamedTuple):
    """Bias of each model per id, [Vs] and [shared], for kernels that add it to the logits."""

    student: Tensor | None = None
    teacher: Tensor | None = None


NO_BIASES = Biases()


class RowTerms(NamedTuple):
    """Values per row: divergences [n_div, R] (with value_scale), ce [R], agrees [R]."""

    divergences: Tensor
    ce: Tensor
    agrees: Tensor


class RowKernel(Protocol):
    """Computation on blocks of rows, in torch (`row_losses`) or Triton (`triton.row_kd`)."""

    def run_(
        self, student: Tensor, teacher: Tensor | None, inputs: RowInputs, gradient: Tensor | None
    ) -> RowTerms:
        """Compute values of all rows and the gradient with respect to the student's raw logits.

        Args:
            student: [R, Vs] raw logits, overwritten; finite in rows that are not valid.
            teacher: [R, shared] raw logits, overwritten; None for only cross-entropy.
            inputs: inputs per row; factors are 0 in rows that are not valid.
            gradient: [R, Vs] output, possibly in another dtype, possibly `student` itself;
                None: no gradient is requested.
        """
        ...


class Scratch:
    """Named buffers of the block size, allocated at first use and then reused."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self._rows = rows
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Return an uninitialised buffer [rows <= block, V]."""
        rows, width = shape
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._rows, width)
        return self._buffers[name][:rows]
