"""Arithmetic on logits that are split over the vocabulary, and nothing that needs Megatron.

Layout (Megatron's): rank r of a tensor-parallel group of size tp holds the columns [r * shard, (r + 1) * shard) of the
padded vocabulary, shard = padded / tp, so the padding ids >= vocab_size are the last columns of the last ranks.
Everything here narrows to the real columns, a view, instead of writing a mask.

Memory: tokens are processed in chunks; the only full-precision copy of logits that ever exists is one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of one full-precision chunk. A CPU wants the chunk to stay in its cache; a GPU wants few, large kernels.
_CHUNK_ELEMENTS_CPU = 2**20
_CHUNK_ELEMENTS_GPU = 2**24


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


def compute_dtype(logits: Tensor) -> torch.dtype:
    """The dtype that sums run in: float32, or float64 where the logits are float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def full_precision_chunks(
    logits: Tensor, dtype: torch.dtype, temperature: float, chunk_tokens: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `logits` and their copy in `dtype`, divided by the temperature, chunk after chunk.

    The copy may be overwritten; its memory is used again for the next chunk. `chunk_tokens` None picks a size by the
    width of a row and the device.
    """
    if chunk_tokens is None:
        budget = _CHUNK_ELEMENTS_CPU if logits.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
        chunk_tokens = max(1, budget // max(1, logits.shape[1]))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    tokens, columns = logits.shape
    if columns == 0:
        return
    buffer = torch.empty((min(chunk_tokens, tokens), columns), dtype=dtype, device=logits.device)
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, tokens))
        chunk = buffer[: rows.stop - start].copy_(logits[rows])
        yield rows, chunk if temperature == 1.0 else chunk.div_(temperature)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def local_log_sum_exp(logits: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int | None) -> Tensor:
    """log of the summed exponentials of this rank's real columns, [tokens]; -inf where it has none."""
    dtype = compute_dtype(logits)
    out = torch.full((logits.shape[0],), -torch.inf, dtype=dtype, device=logits.device)
    for rows, chunk in full_precision_chunks(logits[:, : shard.real_columns()], dtype, temperature, chunk_tokens):
        top = chunk.amax(1)
        shift = torch.where(top == -torch.inf, torch.zeros_like(top), top)  # a row of -inf sums to 0, not to NaN
        out[rows] = chunk.sub_(shift[:, None]).exp_().sum(1).log_().add_(shift)
    return out


def combine_log_sum_exp(
    local: Tensor, shard: VocabShard, also_sum: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp over all ranks from each rank's own, [...]; NaN on any rank gives NaN on every rank.

    `also_sum` [..., n] is summed over the ranks in the same message, which saves a collective.
    """
    if shard.world == 1:
        return local, also_sum
    top = shard.max(torch.where(local.isnan(), -torch.inf, local))
    part = torch.exp(local - top)[..., None]
    if also_sum is None:
        return shard.sum(part)[..., 0].log_().add_(top), None
    both = shard.sum(torch.cat([part, also_sum], dim=-1))
    return both[..., 0].log().add_(top), both[..., 1:]


def gather_local(logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    """Scaled logits at global `ids` [tokens, n] that this rank owns, 0 elsewhere; a sum over ranks completes it."""
    local = ids - shard.offset
    owned = (local >= 0) & (local < shard.real_columns())
    picked = logits.gather(1, torch.where(owned, local, 0)).to(compute_dtype(logits)) / temperature
    return torch.where(owned, picked, torch.zeros_like(picked))


def gathered_logprobs(
    logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs of `ids` [tokens, n] and the normaliser [tokens] that they were computed with, equal on every rank."""
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids must be [tokens, n] with {logits.shape[0]} tokens, got {list(ids.shape)}")
    check_temperature(temperature)
    picked = gather_local(logits, ids, shard, temperature)
    log_z, total = combine_log_sum_exp(local_log_sum_exp(logits, shard, temperature, chunk_tokens), shard, picked)
    assert total is not None
    logprobs = total - log_z[:, None]
    logprobs = torch.where(ids < 0, -torch.inf, logprobs)
    return torch.where(ids >= shard.vocab_size, torch.nan, logprobs), log_z


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
