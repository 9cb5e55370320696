"""How the C allocator of a CPU rank treats freed memory: glibc's settings, a no-op elsewhere.

A sharded model is built by making each tensor whole and freeing it; by default glibc's heap would
keep nearly the model that no rank needs. Training wants the opposite: every operator's output is
freed and asked for again, and memory that went back to the system comes page by page, which costs
a fifth of a CPU step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
RETURNED_BYTES = 128 << 10
KEPT_BYTES = 32 << 20  # the largest that glibc takes
TRIMMED_BYTES = 1 << 30


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Freed tensors go back to the system inside, and stay with the process afterwards."""
    set_thresholds(mapped=RETURNED_BYTES, trimmed=RETURNED_BYTES)
    try:
        yield
    finally:
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Freed tensors stay with the process, for the next step asks for as much again.

    Returns:
        Whether the allocator took the setting; only glibc's has it.
    """
    return set_thresholds(mapped=KEPT_BYTES, trimmed=TRIMMED_BYTES)


def set_thresholds(*, mapped: int, trimmed: int) -> bool:
    """Freed blocks above `mapped` bytes, and heaps with `trimmed` bytes to spare, go back."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, mapped) and mallopt(M_TRIM_THRESHOLD, trimmed))
