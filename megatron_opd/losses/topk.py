"""Exact top-k of vocab-parallel logits, the same for every tensor-parallel size.

The order is by logit, ties to the lowest id. Across ranks only values travel: rank r's ids all lie below rank r + 1's,
so from the values alone every rank knows how many of its own leading ids belong to the global top-k.

Locally nothing sorts the shard: the k largest values lie in the k blocks with the largest maxima (ties to the lowest
block), so one pass of block maxima and two small top-k calls are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.losses.vocab_parallel import VocabShard, vocab_shard

_BLOCK = 64  # ids per block: near sqrt(shard / k) at 38k ids and k 16, and wide enough for a vectorised maximum
_CANDIDATES_CPU = 2**17  # candidates gathered at a time
_CANDIDATES_GPU = 2**23
_MAXIMA_CPU = 2**19  # 16-bit logits widened at a time for their block maxima


@dataclass(frozen=True)
class LocalTop:
    """A rank's share of the global top-k of one model."""

    ids: Tensor  # [tokens, k] int64 local ids, best first; -1 where the rank has fewer than k ids
    values: Tensor  # [tokens, tp, k] every rank's leading logits; slots beyond a rank's real ids mean nothing
    count: Tensor  # [tokens] int64: the first `count` of `ids` are in the global top-k
    invalid: Tensor  # [tokens] bool: a NaN among the logits, on whichever rank


def check_k(k: int, shard: VocabShard) -> None:
    if not 0 < k <= shard.vocab_size:
        raise ValueError(f"k {k} must lie in 1..{shard.vocab_size}, the vocabulary size")


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
    """Positions [rows, k] of the k largest entries of [rows, n], best first, ties to the lowest position."""
    if values.dtype == torch.float64:  # no room for the position beside 64 bits of value
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    keys, mask = _ordered_keys(values)
    return (mask - (keys.topk(k, dim=1).values & mask)).long()


def _block_maxima(blocks: Tensor) -> Tensor:
    """Maxima [rows, n] of blocks [rows, n, block]."""
    if blocks.device.type != "cpu" or blocks.dtype not in (torch.bfloat16, torch.float16):
        return blocks.amax(2)
    # Widening a cache-sized piece first is about twice as fast as torch's own 16-bit maximum on CPU.
    out = torch.empty(blocks.shape[:2], dtype=blocks.dtype, device=blocks.device)
    rows = max(1, _MAXIMA_CPU // (blocks.shape[1] * blocks.shape[2]))
    for start in range(0, blocks.shape[0], rows):
        out[start : start + rows] = blocks[start : start + rows].float().amax(2)
    return out


def _topk_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of [rows, n] as (values [rows, k], ids [rows, k], NaN seen [rows])."""
    blocks = logits.shape[1] // _BLOCK
    if blocks < 2 * k:  # too narrow for blocks to save anything
        ids = _stable_positions(logits, k)
        return logits.gather(1, ids), ids, logits.isnan().any(1)
    blocked = logits[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK))
    tail = logits[:, blocks * _BLOCK :]
    maxima = _block_maxima(blocked)
    # Ascending blocks keep the candidates in the order of their ids, which the tie rule needs.
    chosen = _stable_positions(maxima, k).sort(dim=1).values
    rows = torch.arange(logits.shape[0], device=logits.device)[:, None]
    candidates = torch.cat([blocked[rows, chosen].flatten(1), tail], dim=1)
    position = _stable_positions(candidates, k)
    block = chosen.gather(1, (position // _BLOCK).clamp_(max=k - 1))
    in_tail = position >= k * _BLOCK
    ids = torch.where(in_tail, position + (blocks - k) * _BLOCK, block * _BLOCK + position % _BLOCK)
    return candidates.gather(1, position), ids, maxima.amax(1).isnan() | tail.isnan().any(1)


def local_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact top-k of each row of `logits` [tokens, n], n >= k, best first, ties to the lowest id.

    Returns values [tokens, k] in the logits' dtype, ids [tokens, k] int64, and [tokens] bool: the row holds a NaN.
    """
    budget = _CANDIDATES_CPU if logits.device.type == "cpu" else _CANDIDATES_GPU
    per_row = min(logits.shape[1], k * _BLOCK)
    step = max(1, budget // max(1, per_row))
    parts = [_topk_rows(logits[start : start + step], k) for start in range(0, logits.shape[0], step)]
    if not parts:
        none = logits.new_empty((0, k))
        return none, none.long(), none[:, 0].bool()
    values, ids, invalid = (torch.cat(column) for column in zip(*parts))
    return values, ids, invalid


def _used_columns(shard: VocabShard, k: int, device: torch.device) -> Tensor:
    """Columns of a flattened [tp, k] buffer that are in use; every rank knows how many real ids the others hold."""
    used = [r * k + i for r in range(shard.world) for i in range(min(k, shard.real_columns(r)))]
    return torch.tensor(used, device=device)


@torch.no_grad()
def share_topk(models: Sequence[Tensor], k: int, shard: VocabShard) -> list[LocalTop]:
    """This rank's share of the global top-k of each model's logits [tokens, vocab / tp]; one all-gather of values."""
    check_k(k, shard)
    real = shard.real_columns()
    width = min(k, real)
    tokens, device = models[0].shape[0], models[0].device
    dtype = models[0].dtype
    for logits in models[1:]:
        dtype = torch.promote_types(dtype, logits.dtype)
    mine = torch.zeros((tokens, len(models), k), dtype=dtype, device=device)
    ids = torch.full((tokens, len(models), k), -1, dtype=torch.int64, device=device)
    for m, logits in enumerate(models):
        if width:
            values, ids[:, m, :width], invalid = local_topk(logits[:, :real], width)
            mine[:, m, :width] = values.masked_fill_(invalid[:, None], torch.nan)
    buffer = shard.gather(mine)
    used = _used_columns(shard, k, device)
    values = buffer.flatten(2)[..., used]
    invalid = values.isnan().any(-1)
    threshold = values.topk(k, dim=-1, sorted=True).values[..., -1:]
    ties_left = k - (values > threshold).sum(-1)
    own = buffer[:, :, shard.rank, :width]
    lower = values[..., used < shard.rank * k]
    ties_left = ties_left - (lower == threshold).sum(-1)
    ties = torch.minimum((own == threshold).sum(-1), ties_left.clamp_(min=0))
    count = (own > threshold).sum(-1) + ties
    return [LocalTop(ids[:, m], buffer[:, m], count[:, m], invalid[:, m]) for m in range(len(models))]


def members(top: LocalTop, filler: int) -> Tensor:
    """Local ids [tokens, k] of the global top-k, `filler` where the rank has no more of them."""
    slot = torch.arange(top.ids.shape[1], device=top.ids.device)
    return torch.where(slot < top.count[:, None], top.ids, filler)


@torch.no_grad()
def vocab_parallel_topk(
    logits: Tensor, k: int, group: dist.ProcessGroup | None = None, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The k largest logits over all ranks and their global ids, best first, ties to the lowest id.

    logits [tokens, vocab / tp]: this rank's columns; ids >= vocab_size are padding and never chosen.
    Returns values [tokens, k] in the logits' dtype (NaN on a row that holds a NaN) and ids [tokens, k] int64, both the
    same on every rank and for every tensor-parallel size. Raises ValueError where k exceeds the vocabulary.
    """
    shard = vocab_shard(logits, group, vocab_size)
    top = share_topk([logits], k, shard)[0]
    flat = top.values.flatten(1)
    used = _used_columns(shard, k, logits.device)
    values, position = flat[:, used].sort(dim=1, descending=True, stable=True)  # columns ascend with the ids
    column = used[position[:, :k]]
    mine = column // k == shard.rank
    ids = torch.where(mine, top.ids.gather(1, column % k) + shard.offset, 0)
    return values[:, :k].masked_fill(top.invalid[:, None], torch.nan), shard.sum(ids)
