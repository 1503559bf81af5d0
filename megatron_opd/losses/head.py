"""The losses on a few candidates, straight from the hidden states: the output layer is fused, logits are never whole.

The losses over the full vocabulary read both models' whole distributions and have no such form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.kernels import fused_head_loss
from megatron_opd.losses.candidates import check_rows, weighted_terms
from megatron_opd.losses.registry import DistillTargets

FUSED_KINDS = ("topk_reverse_kl", "sampled_reverse_kl")

# Factors [n] on the prune weights from the student's log-probs [n] of the sampled tokens in some rows.
Reweigh = Callable[[Tensor, slice], Tensor]


def head_loss(
    kind: str,
    hidden: Tensor,
    head: Tensor,
    targets: DistillTargets,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    sequence_parallel: bool = False,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    advantage: Tensor | None = None,
    reweigh: Reweigh | None = None,
) -> tuple[Tensor, Tensor]:
    """`get_loss(kind)` of the logits hidden @ head.T, summed over tokens, and the log-probs of the sampled tokens.

    hidden [tokens, hidden size], [tokens / tp, hidden size] with `sequence_parallel`; head [vocab / tp, hidden size].
    targets, weight: as for the loss itself; `sampled_ids` are always needed.
    advantage [tokens]: adds the policy gradient's term, -advantage times the log-prob of the sampled token.
    reweigh: factors on the prune weights that depend on those log-probs (importance weights).
    The other arguments are those of `fused_head_loss`.

    Returns the scalar, with a gradient by `hidden` and `head`, and [tokens] log-probs without one. Raises ValueError
    for a loss that has no fused form.
    """
    if kind not in FUSED_KINDS:
        raise ValueError(f"loss {kind} reads whole logits and has no fused head; one of {', '.join(FUSED_KINDS)}")
    sampled = targets.require(kind, "sampled_ids")[:, None]
    if kind == "topk_reverse_kl":
        candidates = targets.require(kind, "student_ids")
        teacher = targets.require(kind, "teacher_logprobs")
        ids = torch.cat([candidates, sampled], dim=1)
    else:
        candidates, teacher = sampled, targets.require(kind, "teacher_sampled_logprobs")[:, None]
        ids = sampled
    check_rows("the teacher's log-probs", teacher, tuple(candidates.shape))
    check_rows("weight", weight, (ids.shape[0],))
    weight, n = targets.weighted(weight).detach(), candidates.shape[1]

    def objective(logprobs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        own = logprobs[:, -1]
        factor = weight[rows] if reweigh is None else weight[rows] * reweigh(own, rows)
        terms = weighted_terms(logprobs[:, :n], teacher[rows], factor)
        slope = torch.zeros_like(logprobs)
        slope[:, :n] = terms
        value = terms.sum()
        if advantage is not None:
            value = value - (advantage[rows] * own).sum()
            slope[:, -1] -= advantage[rows]
        return value, slope

    loss, logprobs = fused_head_loss(
        hidden,
        head,
        ids,
        objective,
        group,
        vocab_size=vocab_size,
        sequence_parallel=sequence_parallel,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    return loss, logprobs[:, -1]
