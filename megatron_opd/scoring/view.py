"""What is taken from the teacher's logits, whichever pass produced them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.config import PruneConfig
from megatron_opd.losses import vocab_parallel_logprobs, vocab_shard
from megatron_opd.parallel.exchange import Fields
from megatron_opd.prune import count_shared, teacher_top_p_accept
from megatron_opd.types import Rollout, TeacherScores


@dataclass(frozen=True)
class Candidates:
    """What the teacher is asked about R positions."""

    topk_ids: Tensor  # [R, K] int64, the student's candidates
    sampled: Tensor  # [R] int64

    @classmethod
    def of(cls, rollouts: list[Rollout], start: int = 0, device: torch.device | str = "cpu") -> Candidates:
        return cls(
            torch.cat([r.topk_ids[start:] for r in rollouts]).to(device),
            torch.cat([r.tokens[start:] for r in rollouts]).to(device),
        )


def teacher_view(
    logits: Tensor, asked: Candidates, prune: PruneConfig, vocab_size: int, group: dist.ProcessGroup
) -> Fields:
    """The teacher's answers at R positions, replicated over its tensor ranks.

    Args:
        logits: [R, vocab / tp], the teacher's shard.

    Returns:
        logprobs [R, K] and sampled_logprobs [R] float32 over the full vocabulary, overlap [R] float32 (NaN where the
        signal does not need it) and accepted [R] bool (true where the signal does not need it).
    """
    ids = torch.cat([asked.topk_ids, asked.sampled[:, None]], 1)
    values = vocab_parallel_logprobs(logits, ids, vocab_shard(logits, group, vocab_size))
    rows = len(asked.sampled)
    overlap = torch.full((rows,), float("nan"), device=logits.device)
    accepted = torch.ones(rows, dtype=torch.bool, device=logits.device)
    if prune.signal == "overlap":
        overlap = count_shared(logits, asked.topk_ids[:, : prune.k], prune.k, group, vocab_size) / prune.k
    elif prune.signal == "teacher_top_p":
        accepted = teacher_top_p_accept(logits, asked.sampled, prune.k, prune.teacher_top_p, group, vocab_size)
    return {"logprobs": values[:, :-1], "sampled_logprobs": values[:, -1], "overlap": overlap, "accepted": accepted}


def to_scores(fields: Fields) -> TeacherScores:
    return TeacherScores(fields["logprobs"], fields["sampled_logprobs"], fields["overlap"], fields["accepted"])
