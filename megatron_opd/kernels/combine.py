"""From each tensor-parallel rank's part of the vocabulary to log-probs over all of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def combine_log_sum_exp(
    local: Tensor, group: dist.ProcessGroup | None, also_sum: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp over the ranks of `group` from each rank's own, [...]; NaN on any rank gives NaN on every rank.

    `also_sum` [..., n] is summed over the ranks in the same message, which saves a collective.
    """
    if group is None or group.size() == 1:
        return local, also_sum
    top = torch.where(local.isnan(), -torch.inf, local)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    both = torch.exp(local - top)[..., None]
    if also_sum is not None:
        both = torch.cat([both, also_sum], dim=-1)
    dist.all_reduce(both, group=group)
    return both[..., 0].log().add_(top), None if also_sum is None else both[..., 1:]


def finished_logprobs(logits: Tensor, log_z: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """Log-probs [tokens, n] of global `ids` from their logits, summed over the ranks, and the normaliser [tokens].

    A negative id stands for "no candidate" and has log-prob -inf; an id >= vocab_size is a mistake and gives NaN.
    """
    logprobs = torch.where(ids < 0, -torch.inf, logits - log_z[:, None])
    return torch.where(ids >= vocab_size, torch.nan, logprobs)
