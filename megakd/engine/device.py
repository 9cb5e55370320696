"""The device of a rank: name and peak memory."""

from __future__ import annotations

import resource

import torch


def device_name(device: torch.device) -> str:
    """Return the name of a GPU's model, or the type of any other device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: of the GPU, or of the host if the device is a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
