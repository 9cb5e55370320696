"""Results of a traced step: its parameters, and the memory in use at every moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MAPPED_BYTES = 32 << 20
"""On a CPU rank, blocks of at least this size are mapped one by one (see `engine.memory`)."""


class Amount(NamedTuple):
    """Bytes in small and in large blocks.

    When blocks are freed, the C library's heap keeps small blocks and returns large blocks.
    """

    small: int = 0
    large: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.small + self.large

    def plus(self, other: Amount) -> Amount:
        """Return the sum of both amounts."""
        return Amount(self.small + other.small, self.large + other.large)

    def times(self, share: float) -> Amount:
        """Return the amount multiplied by `share`."""
        return Amount(round(self.small * share), round(self.large * share))

    def most(self, other: Amount) -> Amount:
        """Return the maximum of both amounts for each kind of block."""
        return Amount(max(self.small, other.small), max(self.large, other.large))


NOTHING = Amount()


def amount_of(sizes: Iterable[int]) -> Amount:
    """Return the amount of blocks with these sizes."""
    known = list(sizes)
    large = sum(size for size in known if size >= MAPPED_BYTES)
    return Amount(sum(known) - large, large)


def block(size: float) -> Amount:
    """Return the amount of one block with this size."""
    return amount_of([round(size)])


def mapped(size: float) -> Amount:
    """Return this many bytes as blocks that the C library hands back once they are freed.

    Weights that are built and filled are such blocks, whatever their size: `engine.memory`.
    """
    return Amount(large=round(size))


class Parameter(NamedTuple):
    """One weight of a model.

    decays: the weight is a matrix, not a bias or norm.
    learns: the weight is trained; False for frozen weights.
    """

    numel: int
    decays: bool
    learns: bool = True


class Inventory(tuple[Parameter, ...]):
    """The weights of a module in module order; tied weights occur once."""

    __slots__ = ()

    def of(self, numbers: Iterable[int]) -> Inventory:
        """Return the inventory of some parameters."""
        return Inventory(self[number] for number in numbers)

    @property
    def learned(self) -> Inventory:
        """The inventory of the parameters that learn."""
        return Inventory(parameter for parameter in self if parameter.learns)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(parameter.numel for parameter in self)

    @property
    def largest(self) -> int:
        """Number of weights of the largest parameter."""
        return max((parameter.numel for parameter in self), default=0)

    def amount(self, itemsize: int) -> Amount:
        """Return the memory of all whole parameters, one block per parameter."""
        return amount_of(parameter.numel * itemsize for parameter in self)

    def sharded(self, ranks: int, itemsize: int) -> Amount:
        """Return the memory of a rank's shards if every parameter has one shard per rank."""
        return amount_of(-(-parameter.numel // ranks) * itemsize for parameter in self)


@dataclass
class Moment:
    """The time from the entry of one module to the entry of the next module.

    module: its path. used: numbers of its own parameters and of all others that are read.
    live: peak bytes of activations. workspace: additional bytes of the losses' chunks.
    finished: numbers of the parameters whose gradient becomes complete.
    """

    module: str
    used: set[int] = field(default_factory=set)
    live: Amount = NOTHING
    workspace: Amount = NOTHING
    finished: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Trace:
    """Record of one forward, and optionally its backward, run without computing any values.

    inventory: the weights of the module.
    moments: moments of forward and backward, in order; the backward begins at `turn`.
    flops: operations of matrix products.
    """

    inventory: Inventory
    moments: Sequence[Moment]
    turn: int
    flops: float
