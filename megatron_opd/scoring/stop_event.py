"""Stopping as an event (loss.stop: event), for a student and a teacher that stop on different tokens.

A base student ends on a token that an instruct teacher never gives. At a sampled stop the teacher's log-prob of that
very token then says nothing of whether it would have stopped, and losses punish stopping until no response ends. The
event compares what is meant: the mass of all terminators, each model's own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_opd.types import END_EOS, Rollout, ScoredBatch


def student_stop_logprob(rollout: Rollout, terminators: frozenset[int]) -> float:
    """The student's log-prob, at the last token of a response, of all its terminators among the sampled token and its
    most likely ones; others have less than any of these."""
    at = len(rollout) - 1
    logprobs = {int(rollout.tokens[at]): float(rollout.logprobs[at])}
    logprobs |= dict(zip(rollout.topk_ids[at].tolist(), rollout.topk_logprobs[at].tolist(), strict=True))
    mass = [value for token, value in logprobs.items() if token in terminators]
    return float(torch.tensor(mass, dtype=torch.float64).logsumexp(0))


def weigh_stops(batch: ScoredBatch, terminators: frozenset[int], bound: float | None = None) -> None:
    """Replaces the loss's term at each sampled stop by the event's, a policy gradient whatever the loss:

        -prune weight x A x log p(sampled stop),  A = log(teacher's mass on its terminators) - log(student's on its own)

    with A held constant, and within `bound` nats of 0 (loss.advantage_clip) where there is one. Where the student's
    terminator is a candidate without having been sampled, a loss on candidates compares it as the event, too: else each
    position before the stop would unlearn it, as it does with losses over the whole vocabulary. Stops that the teacher
    has not read or that weigh nothing stay as they are.
    Changes `batch`.
    """
    for i, (rollout, scores) in enumerate(zip(batch.rollouts, batch.scores, strict=True)):
        stop = scores.stop_logprobs
        if stop is None:
            continue
        batch.scores[i] = replace(scores, logprobs=_candidates_as_events(rollout, scores.logprobs, stop, terminators))
        at = len(rollout) - 1
        if rollout.end_reason != END_EOS or at >= len(stop) or batch.kept_length[i] <= at:
            continue
        weight = float(batch.prune_weight[i][at])
        if weight == 0:
            continue
        if batch.advantage is None:
            batch.advantage = [torch.zeros(len(r)) for r in batch.rollouts]
        advantage = float(stop[at]) - student_stop_logprob(rollout, terminators)
        if bound is not None:
            advantage = min(max(advantage, -bound), bound)
        batch.advantage[i][at] = weight * advantage
        batch.prune_weight[i] = batch.prune_weight[i].clone()
        batch.prune_weight[i][at] = 0


def _candidates_as_events(rollout: Rollout, logprobs: Tensor, stop: Tensor, terminators: frozenset[int]) -> Tensor:
    """The teacher's log-probs [T, K] with its event's at the student's terminators, so that the difference to the
    student's own is that of the two events; behind what the teacher has read they stay."""
    measured = len(stop)
    is_stop = torch.isin(rollout.topk_ids[:measured], torch.tensor(sorted(terminators)))
    own = rollout.topk_logprobs[:measured]
    mass = own.masked_fill(~is_stop, -torch.inf).logsumexp(1, keepdim=True)
    event = torch.where(is_stop, own + stop[:, None] - mass, logprobs[:measured])
    return torch.cat([event, logprobs[measured:]])
