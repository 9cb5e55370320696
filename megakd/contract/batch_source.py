"""The protocol of a stage's training batches."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megakd.contract.batch import Batch


class BatchSource(Protocol):
    """The micro-batches of a stage, grouped by optimizer step.

    steps_per_epoch: steps that `num_train_epochs` and the log count as one epoch.
    waited_s: seconds that the loop has waited for batches.
    """

    steps_per_epoch: int
    waited_s: float

    def iterate(self, start: int, stop: int) -> Generator[Sequence[Batch], None, None]:
        """Yield this rank's micro-batches of each step from `start` up to, excluding, `stop`.

        Every rank has the same number of micro-batches in every step. The micro-batches of a step
        depend only on the config, the seed, the step and the state.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that a resumed run and the next window need, equal on every rank.

        The call may be a collective.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        ...

    def scalars(self) -> Mapping[str, float]:
        """Return values to log for the steps since the last call, the same on every rank."""
        ...
