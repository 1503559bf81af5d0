"""What a model's parameters are, in one short word: equal for equal values in every layout and on every device."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from megatron_opd.models.model import Model
from megatron_opd.parallel.collective import from_rank_0, is_rank_0
from megatron_opd.weights.export import export_parameters

CHUNK = 1 << 22  # elements whose 64-bit sums are taken at once
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # odd; those of SplitMix64


@torch.no_grad()
def parameters_fingerprint(model: Model, bucket_bytes: int = 512 << 20) -> str:
    """A hash of the names, shapes, dtypes and values that an engine is given. Collective over all ranks."""
    parts = sorted(
        (name, list(tensor.shape), str(tensor.dtype), checksum(tensor))
        for name, tensor in export_parameters(model, bucket_bytes, keep=is_rank_0())
    )
    return from_rank_0(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20])


def checksum(tensor: Tensor) -> int:
    """Of the elements' bits and positions, in integers that wrap around: the order of summation does not matter."""
    bits = tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    first, second, third = _FACTORS
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].long()
        part = part * second + torch.arange(start + 1, start + 1 + part.numel(), device=part.device) * first
        part = (part ^ (part >> 29)) * third
        total += (part ^ (part >> 32)).sum()
    return int(total)
