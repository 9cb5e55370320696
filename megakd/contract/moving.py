"""Copies of tensors to a device that do not make the host wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on a device, without a host sync; the tensor itself if it is there."""
    # A copy from memory that is not pinned makes the host wait for the device.
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)
