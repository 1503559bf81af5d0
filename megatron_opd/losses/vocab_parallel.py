"""Arithmetic on logits that are split over the vocabulary, and nothing that needs Megatron.

Layout (Megatron's): rank r of a tensor-parallel group of size tp holds the columns [r * shard, (r + 1) * shard) of the
padded vocabulary, shard = padded / tp, so the padding ids >= vocab_size are the last columns of the last ranks.
Everything here narrows to the real columns, a view, instead of writing a mask.

Memory: kernels/ reads the logits in one pass, or in chunks of tokens; no full-precision copy of them ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.kernels import combine_log_sum_exp, finished_logprobs, shard_stats


@dataclass(frozen=True)
class VocabShard:
    """Which part of the vocabulary this rank holds."""

    group: dist.ProcessGroup | None
    rank: int
    world: int
    width: int  # columns of this rank's logits, padding included
    vocab_size: int  # real ids, over all ranks

    @property
    def offset(self) -> int:
        """Global id of the first local column."""
        return self.rank * self.width

    def real_columns(self, rank: int | None = None) -> int:
        """How many of a rank's columns (default: this rank's) are real ids; they are its first ones."""
        start = (self.rank if rank is None else rank) * self.width
        return min(max(self.vocab_size - start, 0), self.width)

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduces in place, and returns, the sum over the ranks; without a group there is nothing to do."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """All-reduces in place, and returns, the maximum over the ranks."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """All-gathers [..., n] of every rank as [..., tp, n]."""
        if self.world == 1:
            return tensor[..., None, :]
        parts = tensor.new_empty((self.world, *tensor.shape))
        dist.all_gather(list(parts.unbind()), tensor.contiguous(), group=self.group)
        return parts.movedim(0, -2)


def vocab_shard(logits: Tensor, group: dist.ProcessGroup | None = None, vocab_size: int | None = None) -> VocabShard:
    """Describes the shard in `logits` [tokens, vocab / tp]; `vocab_size` None means that there is no padding.

    Raises ValueError where `logits` is not a floating matrix or `vocab_size` does not fit the ranks' columns.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [tokens, vocab / tp], got {logits.dtype} {list(logits.shape)}")
    world = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of the tensor-parallel group given")
    padded = logits.shape[1] * world
    if vocab_size is None:
        vocab_size = padded
    if not 0 < vocab_size <= padded:
        raise ValueError(
            f"vocab_size {vocab_size} must lie in 1..{padded}: {world} rank(s) x {logits.shape[1]} columns"
        )
    return VocabShard(group, rank, world, logits.shape[1], vocab_size)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def local_log_sum_exp(logits: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int | None) -> Tensor:
    """log of the summed exponentials of this rank's real columns, [tokens]; -inf where it has none."""
    return shard_stats(logits, 0, None, shard.real_columns(), temperature=temperature, chunk_tokens=chunk_tokens).lse


def gathered_logprobs(
    logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs of `ids` [tokens, n] and the normaliser [tokens] that they were computed with, equal on every rank."""
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids must be [tokens, n] with {logits.shape[0]} tokens, got {list(ids.shape)}")
    check_temperature(temperature)
    found = shard_stats(
        logits, 0, ids - shard.offset, shard.real_columns(), temperature=temperature, chunk_tokens=chunk_tokens
    )
    log_z, total = combine_log_sum_exp(found.lse, shard.group, found.at_ids)
    assert total is not None
    return finished_logprobs(total, log_z, ids, shard.vocab_size), log_z


@torch.no_grad()
def vocab_parallel_logprobs(
    logits: Tensor,
    ids: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Log-probabilities of chosen ids, normalised over the full vocabulary.

    logits [tokens, vocab / tp]: this rank's columns, any floating dtype.
    ids [tokens, n] or [tokens]: global ids, the same on every rank. A negative id stands for "no candidate" and has
    log-prob -inf; an id >= vocab_size is a mistake and gives NaN, which no loss hides.
    Returns float32 (float64 for float64 logits) of the shape of `ids`, the same on every rank; carries no gradient.
    """
    shard = vocab_shard(logits, group, vocab_size)
    matrix = ids[:, None] if ids.dim() == 1 else ids
    return gathered_logprobs(logits, matrix, shard, temperature, chunk_tokens)[0].view(ids.shape)
