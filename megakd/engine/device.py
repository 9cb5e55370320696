"""The device of a rank: its name, and the most memory that was in use."""

from __future__ import annotations

import resource

import torch


def device_name(device: torch.device) -> str:
    """Return the name of a GPU's model, or the type of any other device."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process held: of the device, or of the host where it is a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
