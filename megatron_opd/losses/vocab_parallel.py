"""Log-probs from logits that are split over the vocabulary, and nothing that needs Megatron.

Everything here narrows to the real columns, a view, instead of writing a mask over the padding.

Memory: kernels/ reads the logits in one pass, or in chunks of tokens; no full-precision copy of them ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_opd.kernels import (
    VocabShard,
    combine_log_sum_exp,
    finished_logprobs,
    shard_stats,
    topk_loss_backward_,
    vocab_shard,
)

__all__ = [
    "VocabShard",
    "gathered_logprobs",
    "local_log_sum_exp",
    "student_logprobs",
    "vocab_parallel_logprobs",
    "vocab_shard",
]


def local_log_sum_exp(logits: Tensor, shard: VocabShard, chunk_tokens: int | None) -> Tensor:
    """log of the summed exponentials of this rank's real columns, [tokens]; -inf where it has none."""
    return shard_stats(logits, 0, None, shard.real_columns(), chunk_tokens=chunk_tokens).lse


def gathered_logprobs(
    logits: Tensor, ids: Tensor, shard: VocabShard, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """Log-probs of `ids` [tokens, n] and the normaliser [tokens] that they were computed with, equal on every rank."""
    shard.check(logits)
    if ids.dim() != 2 or ids.shape[0] != logits.shape[0]:
        raise ValueError(f"ids must be [tokens, n] with {logits.shape[0]} tokens, got {list(ids.shape)}")
    stats = shard_stats(logits, 0, ids - shard.offset, shard.real_columns(), chunk_tokens=chunk_tokens)
    log_z, total = combine_log_sum_exp(stats.lse, shard.group, stats.at_ids)
    assert total is not None
    return finished_logprobs(total, log_z, ids, shard.vocab_size), log_z


@torch.no_grad()
def vocab_parallel_logprobs(
    logits: Tensor, ids: Tensor, shard: VocabShard | None = None, chunk_tokens: int | None = None
) -> Tensor:
    """Log-probabilities of chosen ids, normalised over the full vocabulary.

    logits [tokens, vocab / tp]: this rank's columns, any floating dtype.
    ids [tokens, n] or [tokens]: global ids, the same on every rank. A negative id stands for "no candidate" and has
    log-prob -inf; an id >= vocab_size is a mistake and gives NaN, which no loss hides.
    shard: this rank's part of the vocabulary; None means that the logits are whole and have no padding.
    Returns float32 (float64 for float64 logits) of the shape of `ids`, the same on every rank; carries no gradient.
    """
    matrix = ids[:, None] if ids.dim() == 1 else ids
    return gathered_logprobs(logits, matrix, shard or vocab_shard(logits), chunk_tokens)[0].view(ids.shape)


class _Logprobs(torch.autograd.Function):
    """Log-probs of ids [tokens, n]; backward: sum over v of g(v) ([j = v] - softmax(z)_j), chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, shard: VocabShard, chunk_tokens: int | None, inplace_backward: bool
    ) -> Tensor:
        logprobs, log_z = gathered_logprobs(logits, ids, shard, chunk_tokens)
        ctx.save_for_backward(logits, ids, log_z)
        ctx.settings = (shard, chunk_tokens, inplace_backward)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        logits, ids, log_z = ctx.saved_tensors
        shard, chunk_tokens, inplace_backward = ctx.settings
        grad = topk_loss_backward_(
            logits.detach(),
            log_z,
            ids - shard.offset,
            grad_outputs[0],
            shard.real_columns(),
            out=None if inplace_backward else torch.empty_like(logits),
            chunk_tokens=chunk_tokens,
        )
        return grad, None, None, None, None


def student_logprobs(
    student_logits: Tensor,
    ids: Tensor,
    shard: VocabShard | None = None,
    chunk_tokens: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """`vocab_parallel_logprobs` of ids [tokens, n] with a gradient: what policy-gradient terms are built from.

    chunk_tokens, inplace_backward: see `LossOptions`.
    """
    return _Logprobs.apply(student_logits, ids, shard or vocab_shard(student_logits), chunk_tokens, inplace_backward)
