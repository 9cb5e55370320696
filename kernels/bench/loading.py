"""From the name of an implementation to a loss that can be called."""

from __future__ import annotations

from bench import ours, peers
from bench.cases import Case
from bench.problem import Loss

_OURS = {"megakd-triton": "triton", "megakd-chunked": "chunked", "megakd-gemms": "auto"}


def load(name: str, case: Case) -> Loss:
    """The loss; ImportError where what it needs is missing."""
    impl = _OURS.get(name)
    return peers.load(name, case) if impl is None else ours.load(case, impl)
