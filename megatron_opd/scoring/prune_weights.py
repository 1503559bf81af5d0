"""From the teacher's scores to what training uses: prune weights, cuts, effective lengths. Identical on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_opd.config import PruneConfig
from megatron_opd.prune import Reliability, from_events
from megatron_opd.prune.signals import DriftSignal
from megatron_opd.types import Rollout, ScoredBatch, TeacherScores


def assign_prune_weights(
    rollouts: list[Rollout], scores: list[TeacherScores], prune: PruneConfig, signal: DriftSignal
) -> ScoredBatch:
    """Applies the method to one step's responses (docs/method.md, items 2 to 5).

    With `cut: reliability` positions behind the effective length are not kept, but the loss's denominator counts them.
    Without scores (score.mode: fused) every position has weight 1 until the training pass has made the scores.
    """
    lengths = [len(r) for r in rollouts]
    if not scores:
        weights = [torch.ones(n) for n in lengths]
        return ScoredBatch(rollouts, scores, weights, lengths, lengths, [0] * len(lengths), sum(lengths))
    events = pad_sequence([drift_events_of(s, signal) for s in scores], batch_first=True)
    mask = pad_sequence([torch.ones(n, dtype=torch.bool) for n in lengths], batch_first=True)
    result = weigh(events, mask, prune)
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


def drift_events_of(scores: TeacherScores, signal: DriftSignal) -> Tensor:
    """[T] bool: the drift events of one response."""
    columns = {
        "logprobs": scores.logprobs[: scores.measured],
        "sampled_logprobs": scores.sampled_logprobs[: scores.measured],
        **scores.columns,
    }
    return signal.response_events(columns, len(scores.sampled_logprobs))


def weigh(events: Tensor, mask: Tensor, prune: PruneConfig, group: dist.ProcessGroup | None = None) -> Reliability:
    """Reliability and prune weights from drift events [B, T]; see `prune.from_events`.

    Without a signal nothing is an event, and every response position has weight 1: `w_base` is the published method's.
    """
    return from_events(events, mask, prune.w_drop, prune.w_base if prune.watches_drift else 0.0, group)


def add_rewards(batch: ScoredBatch, rewards: list[float], members: set[int], copies: int, coefficient: float) -> None:
    """Past their drift point, the responses in `members` learn from the verifier (prune.after_drift: grpo).

    The advantage of a response is its reward, less the mean and divided by the standard deviation over the prompt's
    responses (GRPO); positions before the drift point keep the teacher's judgement alone. Changes `batch`.

    Args:
        rewards: of every response, in batch order.
        members: indices in the batch; whole prompts.
        copies: responses of one prompt.
        coefficient: factor on the policy gradient beside the distillation loss.
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
