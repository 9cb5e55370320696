"""How a rank treats freed memory: glibc's settings, and what a finished model leaves behind.

A sharded model is built by making each tensor whole and freeing it; by default glibc's heap would
keep nearly the model that no rank needs. Training wants the opposite: every operator's output is
freed and asked for again, and memory that went back to the system comes page by page, which costs
a fifth of a CPU step.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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


@contextmanager
def earlier_objects_left_alone() -> Iterator[None]:
    """Keep objects from before out of garbage collection: modules alone take most of its time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def forget_models() -> None:
    """Free the models that nothing uses any more, and return their memory to the system.

    The hooks of an engine refer to it in a cycle, which Python finds whenever it next collects.
    Until then the next model would be loaded on top of it.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def set_thresholds(*, mapped: int, trimmed: int) -> bool:
    """Freed blocks above `mapped` bytes, and heaps with `trimmed` bytes to spare, go back."""
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, mapped) and mallopt(M_TRIM_THRESHOLD, trimmed))


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None
