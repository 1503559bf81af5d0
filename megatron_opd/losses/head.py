"""Losses on a few log-probs, straight from the hidden states: the output layer is fused, logits are never whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_opd.kernels import VocabShard, fused_head_loss
from megatron_opd.losses.base import PLAIN, DistillTargets, LogprobLoss, Loss, LossOptions, check_shape

CHUNK_TOKENS = 1024  # where the options name none

# Factors [n] on the prune weights from the student's log-probs [n] of the sampled tokens in some rows.
Reweigh = Callable[[Tensor, slice], Tensor]


def head_loss(
    loss: Loss,
    hidden: Tensor,
    head: Tensor,
    targets: DistillTargets,
    weight: Tensor,
    shard: VocabShard,
    options: LossOptions = PLAIN,
    *,
    sequence_parallel: bool = False,
    advantage: Tensor | None = None,
    reweigh: Reweigh | None = None,
) -> tuple[Tensor, Tensor]:
    """`loss` of the logits hidden @ head.T, summed over tokens, and the log-probs of the sampled tokens.

    hidden [tokens, hidden size], [tokens / tp, hidden size] with `sequence_parallel`; head [vocab / tp, hidden size].
    targets, weight: as for the loss itself; `sampled_ids` are always needed.
    options: `inplace_backward` means nothing here.
    advantage [tokens]: adds the policy gradient's term, -advantage times the log-prob of the sampled token.
    reweigh: factors on the prune weights that depend on those log-probs (importance weights).

    Returns the scalar, with a gradient by `hidden` and `head`, and [tokens] log-probs without one. Raises ValueError
    for a loss that has no fused form.
    """
    if not isinstance(loss, LogprobLoss):
        raise ValueError(f"loss {type(loss).__name__} reads whole logits and has no fused head; use a LogprobLoss")
    sampled = targets.require(loss, "sampled_ids")[:, None]
    ids, teacher = loss.ids(targets), loss.teacher_logprobs(targets)
    compared = ids.shape[1]
    if loss.reads != "sampled":
        ids = torch.cat([ids, sampled], dim=1)
    check_shape("weight", weight, (ids.shape[0],))
    weight = weight.detach()

    def objective(logprobs: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        own = logprobs[:, -1]
        factor = weight[span] if reweigh is None else weight[span] * reweigh(own, span)
        slope = torch.zeros_like(logprobs)
        value, slope[:, :compared] = loss.value_and_slope(logprobs[:, :compared], teacher[span], factor)
        if advantage is not None:
            value = value - (advantage[span] * own).sum()
            slope[:, -1] -= advantage[span]
        return value, slope

    total, logprobs = fused_head_loss(
        hidden,
        head,
        ids,
        objective,
        shard,
        sequence_parallel=sequence_parallel,
        chunk_tokens=options.chunk_tokens or CHUNK_TOKENS,
    )
    return total, logprobs[:, -1]
