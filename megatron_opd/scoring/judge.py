"""From the teacher's scores to what training uses: prune weights, cuts, effective lengths. Identical on every rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_opd.config import PruneConfig
from megatron_opd.prune import drift_events, from_events
from megatron_opd.types import Rollout, ScoredBatch, TeacherScores


def judge(rollouts: list[Rollout], scores: list[TeacherScores], prune: PruneConfig) -> ScoredBatch:
    """Applies the method to one step's answers (method.md, items 2 to 5).

    Without a signal every position has prune weight 1 and counts as reliable. With `cut: reliability` positions behind
    the effective length are not kept; the denominator counts them all the same. Without scores (score.mode: fused) the
    training pass fills in what follows from them.
    """
    lengths = [len(r) for r in rollouts]
    if prune.signal == "none" or not scores:
        weights = [torch.ones(n) for n in lengths]
        return ScoredBatch(rollouts, scores, weights, lengths, lengths, [0] * len(lengths), sum(lengths))
    mask = pad_sequence([torch.ones(n, dtype=torch.bool) for n in lengths], batch_first=True)
    result = from_events(drift_events_of(scores, mask, prune), mask, prune.w_drop, prune.w_base)
    effective = result.effective_length.tolist()
    return ScoredBatch(
        rollouts=rollouts,
        scores=scores,
        prune_weight=[w[:n] for w, n in zip(result.loss_weight, lengths)],
        kept_length=effective if prune.cut == "reliability" else lengths,
        effective_length=effective,
        events=result.total_events.tolist(),
        response_tokens=sum(lengths),
    )


def use_rewards(batch: ScoredBatch, rewards: list[float], members: set[int], copies: int, coefficient: float) -> None:
    """Past their drift point, the answers in `members` learn from the verifier (prune.after_drift: grpo).

    The advantage of an answer is its reward, less the mean and divided by the standard deviation over the prompt's
    answers (GRPO); positions before the drift point keep the teacher's judgement alone. Changes `batch`.

    Args:
        rewards: of every answer, in batch order.
        members: places in the batch; whole prompts.
        copies: answers of one prompt.
        coefficient: weight of the policy gradient beside the distillation loss.
    """
    value = torch.tensor(rewards, dtype=torch.float64).view(-1, copies)
    spread = value.std(1, keepdim=True, unbiased=False)
    normalised = ((value - value.mean(1, keepdim=True)) / (spread + 1e-6)).flatten()
    batch.advantage = [torch.zeros(len(r)) for r in batch.rollouts]
    for i in members:
        start = batch.effective_length[i]
        gain = coefficient * float(normalised[i])
        if gain and start < len(batch.rollouts[i]):
            batch.advantage[i][start:] = gain
            batch.kept_length[i] = len(batch.rollouts[i])


def drift_events_of(scores: list[TeacherScores], mask: Tensor, prune: PruneConfig) -> Tensor:
    """Drift events of B answers by the configured signal; mask [B, T]: their response positions -> bool [B, T]."""
    if prune.signal == "teacher_top_p":
        return ~pad_sequence([s.accepted for s in scores], batch_first=True, padding_value=True)
    # NaN: behind the drift point a position that nobody judged any more; otherwise a broken teacher, whose loss skips
    # the step
    unjudged = prune.after_drift == "grpo" or (prune.cut == "reliability" and not prune.in_flight)
    unmeasured = 1.0 if unjudged else 0.0
    overlap = pad_sequence([s.overlap for s in scores], batch_first=True).nan_to_num(nan=unmeasured)
    return drift_events(overlap, mask, prune.threshold)
