"""Exact top-k of the rows of a matrix in torch: the CPU implementation, and what the Triton kernel is tested against.

Nothing sorts the rows: the k largest values lie in the k blocks with the largest maxima (ties to the lowest block), so
one pass of block maxima and two small top-k calls are exact.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_opd.kernels.numpy_topk import numpy_topk

_BLOCK = 64  # ids per block: near sqrt(shard / k) at 38k ids and k 16, and wide enough for a vectorised maximum
_CANDIDATES_CPU = 2**17  # candidates gathered at a time
_CANDIDATES_GPU = 2**23


def _ordered_keys(values: Tensor) -> tuple[Tensor, int]:
    """Integers that sort as (value, then lower position first), and the mask of the position's bits.

    bfloat16 has only 16 significant bits, so value and position share an int32, which halves the work of a top-k.
    """
    width = values.shape[1]
    bits = (values.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the order of floats as the order of signed integers
    if values.dtype == torch.bfloat16 and width <= 2**16:
        mask, keys = 2**16 - 1, bits & -(2**16)
    else:
        mask, keys = 2**32 - 1, bits.long() << 32
    return keys | (mask - torch.arange(width, device=values.device, dtype=keys.dtype)), mask


def _stable_positions(values: Tensor, k: int) -> Tensor:
    """Positions [tokens, k] of the k largest entries of [tokens, n], best first, ties to the lowest position."""
    if values.dtype == torch.float64:  # no room for the position beside 64 bits of value
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    keys, mask = _ordered_keys(values)
    if keys.device.type == "cpu" and keys.shape[1] > k:  # numpy's vectorised selection: three times as fast as topk
        largest = torch.from_numpy(np.partition(keys.numpy(), keys.shape[1] - k, axis=1)[:, -k:])
        best = largest.sort(dim=1, descending=True).values
    else:
        best = keys.topk(k, dim=1).values
    return (mask - (best & mask)).long()


def _topk_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of [tokens, n] as (values [tokens, k], ids [tokens, k], NaN seen [tokens])."""
    blocks = logits.shape[1] // _BLOCK
    if blocks < 2 * k:  # too narrow for blocks to save anything
        ids = _stable_positions(logits, k)
        return logits.gather(1, ids), ids, logits.isnan().any(1)
    blocked = logits[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    tail = logits[:, blocks * _BLOCK :]
    maxima = blocked.amax(2)
    # Ascending blocks keep the candidates in the order of their ids, which the tie rule needs.
    chosen = _stable_positions(maxima, k).sort(dim=1).values
    tokens = torch.arange(logits.shape[0], device=logits.device)[:, None]
    candidates = torch.cat([blocked[tokens, chosen].flatten(1), tail], dim=1)
    position = _stable_positions(candidates, k)
    block = chosen.gather(1, (position // _BLOCK).clamp_(max=k - 1))
    in_tail = position >= k * _BLOCK
    ids = torch.where(in_tail, position + (blocks - k) * _BLOCK, block * _BLOCK + position % _BLOCK)
    return candidates.gather(1, position), ids, maxima.amax(1).isnan() | tail.isnan().any(1)


def torch_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact top-k of each token's `logits` [tokens, n], n >= k, best first, ties to the lowest id.

    Returns values [tokens, k] in the logits' dtype, ids [tokens, k] int64, and [tokens] bool: NaN among the logits.
    """
    if logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16) and logits.shape[0]:
        shortcut = numpy_topk(logits, k)
        if shortcut is not None:
            return logits.gather(1, shortcut[0]), *shortcut
    budget = _CANDIDATES_CPU if logits.device.type == "cpu" else _CANDIDATES_GPU
    per_token = min(logits.shape[1], k * _BLOCK)
    step = max(1, budget // max(1, per_token))
    parts = [_topk_tokens(logits[start : start + step], k) for start in range(0, logits.shape[0], step)]
    if not parts:
        none = logits.new_empty((0, k))
        return none, none.long(), none[:, 0].bool()
    values, ids, invalid = (torch.cat(column) for column in zip(*parts))
    return values, ids, invalid
