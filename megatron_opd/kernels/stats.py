"""One pass over a shard of logits: its log-sum-exp, its top-k and the logits at given ids.

On a GPU a Triton kernel reads the shard once; elsewhere torch does the same in chunks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.kernels.backend import kernel_backend
from megatron_opd.kernels.chunks import compute_dtype, full_precision_chunks
from megatron_opd.kernels.torch_topk import torch_topk


@dataclass(frozen=True)
class ShardStats:
    """What one pass over logits [tokens, vocab / tp] finds; ids are local columns."""

    lse: Tensor  # [tokens] float32 (float64 for float64 logits): log of the summed exponentials of the real columns
    values: Tensor  # [tokens, k] in the logits' dtype, best first, ties to the lowest id; anything on an invalid row
    ids: Tensor  # [tokens, k] int64
    at_ids: Tensor  # [tokens, n] in lse's dtype: logits at the given ids, 0 where the shard does not have the id
    invalid: Tensor  # [tokens] bool: a NaN among the real columns


@torch.no_grad()
def shard_stats(
    logits: Tensor,
    k: int,
    ids: Tensor | None = None,
    real_columns: int | None = None,
    *,
    chunk_tokens: int | None = None,
) -> ShardStats:
    """Log-sum-exp, top-k and chosen logits of `logits` [tokens, vocab / tp], any floating dtype, in one pass.

    k: how many of the largest logits to find, 0 for none.
    ids [tokens, n]: local columns whose logits are wanted; outside [0, real_columns) they give 0, so that a sum over
    the tensor-parallel ranks completes `at_ids`. None for none.
    real_columns: columns from here on are padding; None: there is none.
    chunk_tokens: tokens that the torch path holds in full precision at a time; None picks it.
    Raises ValueError where k or the shapes cannot be meant.
    """
    real = logits.shape[1] if real_columns is None else real_columns
    if logits.dim() != 2 or not 0 <= k <= real <= logits.shape[1]:
        raise ValueError(f"0 <= k {k} <= real_columns {real} <= the width of logits {list(logits.shape)} must hold")
    if ids is None:
        ids = torch.empty((logits.shape[0], 0), dtype=torch.int64, device=logits.device)
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids must be [tokens, n] with {logits.shape[0]} tokens, got {list(ids.shape)}")
    if kernel_backend(logits.device, logits.dtype) == "torch" or not real:
        return _torch_stats(logits[:, :real], k, ids, chunk_tokens)
    from megatron_opd.kernels import triton_launch

    return ShardStats(*triton_launch.stats(logits, k, ids, real))


@torch.no_grad()
def local_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact top-k of each token's `logits` [tokens, n], n >= k, best first, ties to the lowest id.

    Returns values [tokens, k] in the logits' dtype, ids [tokens, k] int64, and [tokens] bool: NaN among the logits.
    """
    if kernel_backend(logits.device, logits.dtype) == "torch":
        return torch_topk(logits, k)
    stats = shard_stats(logits, k)
    return stats.values, stats.ids, stats.invalid


def _torch_stats(logits: Tensor, k: int, ids: Tensor, chunk_tokens: int | None) -> ShardStats:
    real = logits.shape[1]
    lse = _torch_log_sum_exp(logits, chunk_tokens)
    if k:
        values, top, invalid = torch_topk(logits, k)
    else:
        values, top = logits.new_empty((logits.shape[0], 0)), ids.new_empty((logits.shape[0], 0))
        invalid = lse.isnan()  # or an infinity
        if bool(invalid.any()):
            invalid[invalid.clone()] = logits[invalid].isnan().any(1)
    owned = (ids >= 0) & (ids < real)
    picked = torch.zeros(ids.shape, dtype=lse.dtype, device=logits.device)
    if real:
        picked = torch.where(owned, logits.gather(1, torch.where(owned, ids, 0)).to(lse.dtype), picked)
    return ShardStats(lse, values, top, picked, invalid)


def _torch_log_sum_exp(logits: Tensor, chunk_tokens: int | None) -> Tensor:
    dtype = compute_dtype(logits)
    out = torch.full((logits.shape[0],), -torch.inf, dtype=dtype, device=logits.device)
    for span, chunk in full_precision_chunks(logits, dtype, chunk_tokens):
        top = chunk.amax(1)
        shift = torch.where(top == -torch.inf, torch.zeros_like(top), top)  # a row of -inf sums to 0, not to NaN
        out[span] = chunk.sub_(shift[:, None]).exp_().sum(1).log_().add_(shift)
    return out
