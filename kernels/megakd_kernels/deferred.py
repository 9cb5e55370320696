"""A `KDOutput` whose statistics are each formed when they are first read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from megakd_kernels.settings import KDOutput


class DeferredOutput(KDOutput):
    """Result of a loss so small that its statistics would take longer than the loss.

    A statistic is formed at the first access to it or to the output as a tuple. It comes from
    tensors that nobody else has, so a change in place of the logits or labels between the loss and
    the access changes nothing.
    """

    _form: Callable[[str], Tensor]
    _known: dict[str, Tensor]

    # Whatever is derived from an output is a plain KDOutput.
    _make = KDOutput._make  # pyright: ignore[reportAssignmentType]

    def __new__(cls, *values: Tensor) -> KDOutput:  # pyright: ignore[reportInconsistentConstructor]
        """Return the plain output of eight tensors, as code that rebuilds named tuples expects."""
        return KDOutput(*values)

    @classmethod
    def of_loss(cls, loss: Tensor, form: Callable[[str], Tensor]) -> KDOutput:
        """Return an output with this loss; `form` computes a field by name, without gradient."""
        # The tuple's own entries, except for the loss, are never read.
        output = tuple.__new__(cls, (loss, *_NOT_FORMED))
        output._form, output._known = form, {}  # noqa: SLF001, its own
        return output

    def formed(self) -> KDOutput:
        """Return the output with all statistics."""
        return KDOutput(self.loss, *map(self._statistic, KDOutput._fields[1:]))

    def _statistic(self, name: str) -> Tensor:
        if name not in self._known:
            self._known[name] = self._form(name)
        return self._known[name]

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the fields."""
        return iter(self.formed())

    def __eq__(self, other: object) -> bool:
        """Compare the fields, as tuples do."""
        return tuple(self) == (tuple(other) if isinstance(other, tuple) else other)

    def __ne__(self, other: object) -> bool:
        """Compare the fields; a tuple's own method would compare entries that are not formed."""
        return not self == other

    def __reduce__(self) -> tuple[type[KDOutput], tuple[Tensor, ...]]:
        """Copy and pickle as a plain output."""
        return KDOutput, tuple(self)

    def __hash__(self) -> int:
        """Return the hash of the fields."""
        return hash(self.formed())


_NOT_FORMED = (None,) * (len(KDOutput._fields) - 1)
_OF_TUPLES = ("__getitem__", "__contains__", "__add__", "__repr__", "_replace")


def _field(name: str) -> property:
    return property(lambda output: output._statistic(name))  # noqa: SLF001


def _method(name: str) -> Callable[..., Any]:
    def call(output: DeferredOutput, *arguments: Any, **options: Any) -> Any:
        return getattr(output.formed(), name)(*arguments, **options)

    return call


for _name in KDOutput._fields[1:]:
    setattr(DeferredOutput, _name, _field(_name))
for _name in _OF_TUPLES:
    setattr(DeferredOutput, _name, _method(_name))
