"""Seconds that this rank has spent in collectives, its own and those of DeepSpeed.

A collective of the CPU ends where its handle is waited for. A collective of NCCL runs on the GPU
beside the host; its duration is in the records that torch keeps of the last collectives.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from torch._C import _distributed_c10d

_RECORDS = {"TORCH_NCCL_ENABLE_TIMING": "1", "TORCH_FR_BUFFER_SIZE": "2000"}
_on_host = [0.0]
_on_gpu = [0.0]
_last_record = [-1]
_wait: Any = _distributed_c10d.Work.wait


def clock_collectives() -> None:
    """Measure all collectives of this process from now on; call it before a process group starts.

    What the environment sets for NCCL's records stays; without them a GPU's waits count as 0.
    """
    for name, value in _RECORDS.items():
        os.environ.setdefault(name, value)
    work: Any = _distributed_c10d.Work  # torch calls no hook for collectives of gloo
    work.wait = _clocked_wait


def _clocked_wait(work: Any, *arguments: Any, **options: Any) -> Any:
    began = time.perf_counter()
    try:
        return _wait(work, *arguments, **options)
    finally:
        _on_host[0] += time.perf_counter() - began


def seconds_in_collectives() -> float:
    """Return the time in collectives so far, with what they transfer; call it between steps."""
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json", None)
    if dump is not None:
        _add_records(json.loads(dump()).get("entries", ()))
    return _on_host[0] + _on_gpu[0]


def _add_records(entries: Any) -> None:
    done = [e for e in entries if e["record_id"] > _last_record[0] and "duration_ms" in e]
    if done:
        newest = max(entry["record_id"] for entry in done)
        # Older records have been overwritten if a step has more collectives than are kept.
        scale = (newest - _last_record[0]) / len(done)
        _on_gpu[0] += scale * sum(entry["duration_ms"] for entry in done) / 1000
        _last_record[0] = newest
