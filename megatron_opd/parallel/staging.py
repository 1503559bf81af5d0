"""Tensors between host and device, many in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 16  # bytes: what the widest loads of a kernel want


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors on `device`, through one buffer of pinned memory, without waiting for the copy.

    Where `device` is the CPU these are the given tensors themselves. On a GPU they share memory with each other.
    """
    if device.type == "cpu":
        return list(tensors)
    buffer = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, pin_memory=True)
    for part, tensor in zip(_parts(buffer, tensors), tensors):
        part.copy_(tensor)
    return _parts(buffer.to(device, non_blocking=True), tensors)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device in host memory, in one copy, which is waited for; they share memory with each other."""
    if not tensors or tensors[0].device.type == "cpu":
        return list(tensors)
    buffer = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, device=tensors[0].device)
    for part, tensor in zip(_parts(buffer, tensors), tensors):
        part.copy_(tensor)
    return _parts(buffer.cpu(), tensors)


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins in a buffer, bytes; then the buffer's size."""
    starts = [0]
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        starts.append(starts[-1] + -(-size // _ALIGNED) * _ALIGNED)
    return starts


def _parts(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a buffer of bytes, in the tensors' dtypes and shapes."""
    return [
        buffer[start : start + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        for start, t in zip(_starts(like), like)
    ]
