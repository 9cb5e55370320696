"""Freed memory of a rank: settings of glibc's allocator, and clean-up after a finished model.

When a sharded model is built, each tensor is created whole and then freed. By default, glibc's
heap would keep most of this memory, nearly a whole model per rank, so that it must be returned to
the system. During training the opposite holds: every operator's output is freed and allocated
again. Memory that was returned to the system comes back page by page, which costs 20 % of a CPU
step.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
RETURNED_BYTES = 128 << 10
KEPT_BYTES = 32 << 20  # the largest value that glibc accepts
TRIMMED_BYTES = 1 << 30


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Return freed tensors to the system in the body, and keep them in the process afterwards."""
    set_thresholds(mapped=RETURNED_BYTES, trimmed=RETURNED_BYTES)
    try:
        yield
    finally:
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Keep freed tensors in the process, because the next step allocates the same amount.

    Returns:
        Whether the allocator accepted the setting; only glibc's allocator has the setting.
    """
    return set_thresholds(mapped=KEPT_BYTES, trimmed=TRIMMED_BYTES)


@contextmanager
def earlier_objects_left_alone() -> Iterator[None]:
    """Exclude existing objects from garbage collection; modules alone take most of its time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def forget_models() -> None:
    """Free models that are no longer used, and return their memory to the system.

    An engine and its hooks form a reference cycle, which Python frees only at the next garbage
    collection. Without this call, the next model would be loaded while the old model still takes
    memory.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def set_thresholds(*, mapped: int, trimmed: int) -> bool:
    """Set when glibc returns memory to the system.

    Args:
        mapped: freed blocks of more bytes are returned.
        trimmed: a heap is trimmed when it has this many unused bytes at its end.

    Returns:
        Whether the allocator accepted both settings.
    """
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, mapped) and mallopt(M_TRIM_THRESHOLD, trimmed))


def _c_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None
