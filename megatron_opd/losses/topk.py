"""Exact top-k of vocab-parallel logits, the same for every tensor-parallel size.

The order is by logit, ties to the lowest id. Across ranks only values travel: rank r's ids all lie below rank r + 1's,
so from the values alone every rank knows how many of its own leading ids belong to the global top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_opd.kernels import local_topk
from megatron_opd.losses.vocab_parallel import VocabShard, vocab_shard


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


def _used_columns(shard: VocabShard, k: int, device: torch.device) -> Tensor:
    """Columns of a flattened [tp, k] buffer that are in use; every rank knows how many real ids the others hold."""
    return _columns(tuple(min(k, shard.real_columns(r)) for r in range(shard.world)), k, device)


@lru_cache(maxsize=64)  # else a copy that a GPU waits for, at each token of a response
def _columns(counts: tuple[int, ...], k: int, device: torch.device) -> Tensor:
    return torch.tensor([r * k + i for r, count in enumerate(counts) for i in range(count)], device=device)


@torch.no_grad()
def share_topk(models: Sequence[Tensor], k: int, shard: VocabShard) -> list[LocalTop]:
    """This rank's share of the global top-k of each model's logits [tokens, vocab / tp]; one all-gather of values."""
    check_k(k, shard)
    for logits in models:
        shard.check(logits)
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
    lower = (values == threshold) & (used < shard.rank * k)  # a mask as an index would make the host wait
    ties_left = ties_left - lower.sum(-1)
    ties = torch.minimum((own == threshold).sum(-1), ties_left.clamp_(min=0))
    count = (own > threshold).sum(-1) + ties
    return [LocalTop(ids[:, m], buffer[:, m], count[:, m], invalid[:, m]) for m in range(len(models))]


def members(top: LocalTop, filler: int) -> Tensor:
    """Local ids [tokens, k] of the global top-k, `filler` where the rank has no more of them."""
    slot = torch.arange(top.ids.shape[1], device=top.ids.device)
    return torch.where(slot < top.count[:, None], top.ids, filler)


@torch.no_grad()
def vocab_parallel_topk(logits: Tensor, k: int, shard: VocabShard | None = None) -> tuple[Tensor, Tensor]:
    """The k largest logits over all ranks and their global ids, best first, ties to the lowest id.

    logits [tokens, vocab / tp]: this rank's columns; padding ids are never chosen.
    shard: this rank's part of the vocabulary; None means that the logits are whole and have no padding.
    Returns values [tokens, k] in the logits' dtype (NaN on a row that holds a NaN) and ids [tokens, k] int64, both the
    same on every rank and for every tensor-parallel size. Raises ValueError where k exceeds the vocabulary.
    """
    shard = shard or vocab_shard(logits)
    top = share_topk([logits], k, shard)[0]
    flat = top.values.flatten(1)
    used = _used_columns(shard, k, logits.device)
    values, position = flat[:, used].sort(dim=1, descending=True, stable=True)  # columns ascend with the ids
    column = used[position[:, :k]]
    mine = column // k == shard.rank
    ids = torch.where(mine, top.ids.gather(1, column % k) + shard.offset, 0)
    return values[:, :k].masked_fill(top.invalid[:, None], torch.nan), shard.sum(ids)
