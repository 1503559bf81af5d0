"""The language model's head and a loss on a few log-probs per token, in chunks of tokens: logits are never whole.

The forward computes each chunk's logits, loss and gradients and drops the logits; the backward scales what is stored.
So the memory is one chunk of logits [chunk, vocab / tp], the gradient of the hidden states, and a float32 sum of the
head's gradient, however long the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.kernels.backward import topk_loss_backward_
from megatron_opd.kernels.chunks import compute_dtype
from megatron_opd.kernels.combine import combine_log_sum_exp, finished_logprobs
from megatron_opd.kernels.shard import VocabShard
from megatron_opd.kernels.stats import shard_stats

# From the log-probs [c, n] of a chunk's ids and the chunk's rows to the loss, summed over the chunk, and its
# derivatives by those log-probs [c, n]. Called without gradients, and the same on every tensor-parallel rank.
Objective = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        objective: Objective,
        shard: VocabShard,
        sequence_parallel: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        sequence_parallel = sequence_parallel and shard.world > 1
        whole = hidden
        if sequence_parallel:
            whole = hidden.new_empty((hidden.shape[0] * shard.world, hidden.shape[1]))
            dist.all_gather_into_tensor(whole, hidden.contiguous(), group=shard.group)
        tokens, dtype = whole.shape[0], compute_dtype(head)
        by_hidden = torch.empty_like(whole) if ctx.needs_input_grad[0] else None
        by_head = torch.zeros_like(head, dtype=dtype) if ctx.needs_input_grad[1] else None
        buffer = whole.new_empty((min(chunk_tokens, tokens), shard.width))
        logprobs = torch.empty(ids.shape, dtype=dtype, device=ids.device)
        loss = torch.zeros((), dtype=dtype, device=ids.device)
        for start in range(0, tokens, chunk_tokens):
            span = slice(start, min(start + chunk_tokens, tokens))
            local = ids[span] - shard.offset
            logits = torch.mm(whole[span], head.t(), out=buffer[: span.stop - start])
            stats = shard_stats(logits, 0, local, shard.real_columns())
            log_z, total = combine_log_sum_exp(stats.lse, shard.group, stats.at_ids)
            assert total is not None
            logprobs[span] = finished_logprobs(total, log_z, ids[span], shard.vocab_size)
            value, slope = objective(logprobs[span], span)
            loss += value
            if by_hidden is None and by_head is None:
                continue
            topk_loss_backward_(logits, log_z, local, slope, shard.real_columns())
            if by_hidden is not None:
                torch.mm(logits, head, out=by_hidden[span])
            if by_head is not None:
                _add_product(by_head, logits.t(), whole[span])
        del buffer
        if by_hidden is not None and sequence_parallel:
            part = torch.empty_like(hidden)
            dist.reduce_scatter_tensor(part, by_hidden, group=shard.group)
            by_hidden = part
        elif by_hidden is not None:
            shard.sum(by_hidden)
        ctx.save_for_backward(by_hidden, by_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(logprobs)
        return loss, logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        by_hidden, by_head = ctx.saved_tensors
        scale = grad_outputs[0]
        if by_hidden is not None:
            by_hidden = by_hidden * scale.to(by_hidden.dtype)
        if by_head is not None:
            by_head = by_head.mul_(scale).to(ctx.head_dtype)
        return by_hidden, by_head, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, the sum kept in total's dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def fused_head_loss(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    objective: Objective,
    shard: VocabShard | None = None,
    *,
    sequence_parallel: bool = False,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """A loss on the log-probs of a few ids per token, straight from the hidden states.

    hidden [tokens, hidden size], or [tokens / tp, hidden size] with `sequence_parallel`: what the output layer reads.
    head [vocab / tp, hidden size]: this rank's rows of the output layer, or of the embedding that it shares.
    ids [tokens, n]: global ids, the same on every rank; negative: no candidate.
    objective: from the log-probs of a chunk to its loss and their derivatives, see `Objective`; `losses` makes them.
    shard: this rank's part of the vocabulary; None means that the head is whole and has no padding.
    chunk_tokens: tokens whose logits exist at once.

    Returns the loss, a scalar summed over the tokens, with a gradient by `hidden` and `head`, and the log-probs
    [tokens, n] of the ids, float32 (float64), without one; both the same on every rank of the group. Where nothing
    needs a gradient none is computed.

    The gradient of `hidden` is summed over the group (scattered with `sequence_parallel`), as Megatron-Core's
    ColumnParallelLinear does. The head's is returned in the head's dtype, as autograd wants it, after being summed over
    chunks in float32: Megatron-Core's hook adds it to `main_grad`. Gradient accumulation fusion would want it written
    there by the kernel; this does not do that, and the loss is the last use of the head either way.
    The collectives run in the forward: every rank of the group must call it, with the same number of tokens.
    """
    shard = VocabShard.of(None, head.shape[0]) if shard is None else shard
    tokens = hidden.shape[0] * (shard.world if sequence_parallel else 1)
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or head.shape[0] != shard.width:
        raise ValueError(
            f"hidden {list(hidden.shape)} and head {list(head.shape)} must be [tokens, hidden size] and "
            f"[vocab / tp, hidden size] with vocab / tp {shard.width}"
        )
    if ids.dim() != 2 or ids.shape[0] != tokens:
        raise ValueError(f"ids must be [tokens, n] with {tokens} tokens, got {list(ids.shape)}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    return _FusedHead.apply(hidden, head, ids, objective, shard, sequence_parallel, chunk_tokens)
