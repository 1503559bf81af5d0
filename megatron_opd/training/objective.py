"""What one micro-batch is trained on, and the sums that a step is reported by.

    loss = sum over tokens of (prune weight x importance weight x distillation loss - advantage x log p(sampled token))
           / response tokens of the global batch

The prune weight is the method's, the importance weight corrects for a sampler that is not quite the trainer, and the
advantage, of the verifier's reward, takes over past the drift point. On the way the gap between both is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.config import Config, ConfigError
from megatron_opd.losses import (
    Loss,
    LossOptions,
    VocabShard,
    get_loss,
    head_loss,
    rebuilt_loss,
    student_logprobs,
    vocab_parallel_logprobs,
)
from megatron_opd.training.microbatch import MicroBatch

Number = TypeVar("Number", Tensor, float)


def build_loss(config: Config) -> Loss:
    """The loss that the config names, with its parameters.

    Raises ConfigError where it does not exist, refuses its parameters, or does not go with the rest of the config.
    """
    loss = get_loss(config.loss.kind, config.loss.parameters)
    problems = config.loss_problems(loss.reads, loss.fused_head)
    if problems:
        raise ConfigError("; ".join(problems))
    return loss


@dataclass(frozen=True)
class Sums(Generic[Number]):
    """Of one micro-batch, as scalars on its device; of a step, over all ranks, as numbers."""

    loss: Number
    gap: Number  # |rollout - student| log-prob of the sampled tokens, nats
    gap_above: Number  # tokens whose gap is above rollout.gap_threshold
    gap_tokens: Number  # tokens whose gap was measured
    mismatch: Number  # r - log r - 1, r = trainer's over sampler's probability: its mean estimates the samplers' KL
    ratio: Number  # r
    ratio_squared: Number  # r squared
    gap_max: Number  # the largest gap: a maximum, not a sum


def over_ranks(parts: list[Sums[Tensor]], device: torch.device) -> Sums[float]:
    """The step's sums from the micro-batches of every rank that owns results; other ranks give none. Collective."""
    summed = torch.zeros(7, dtype=torch.float64, device=device)
    largest = torch.zeros(1, dtype=torch.float64, device=device)
    for part in parts:
        gaps = part.gap, part.gap_above, part.gap_tokens, part.mismatch, part.ratio, part.ratio_squared
        summed += torch.stack([x.double() for x in (part.loss, *gaps)])
        largest = torch.maximum(largest, part.gap_max.double())
    dist.all_reduce(summed)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    loss, gap, gap_above, gap_tokens, mismatch, ratio, ratio_squared = summed.tolist()
    return Sums(loss, gap, gap_above, gap_tokens, mismatch, ratio, ratio_squared, largest.item())


class Objective:
    """The loss of a micro-batch from the student's logits, or from its hidden states where the head is fused."""

    def __init__(
        self,
        loss: Loss,
        config: Config,
        shard: VocabShard,
        response_tokens: int,
        teacher_head: Tensor | None = None,
    ) -> None:
        """response_tokens: of the global batch; pruned ones count too, since the method does not renormalise.
        teacher_head [vocab / tp, its hidden size]: with score.payload: hidden, what its logits are rebuilt with."""
        self.loss, self.shard, self.response_tokens, self.teacher_head = loss, shard, response_tokens, teacher_head
        self.chunk_tokens, self.k = config.loss.chunk_tokens, config.loss_k
        self.importance_clip, self.gap_threshold = config.rollout.importance_clip, config.rollout.gap_threshold
        self.measures_gap = measures_gap(config)

    def of_logits(self, logits: Tensor, micro: MicroBatch) -> tuple[Tensor, Sums[Tensor]]:
        """logits [T, vocab / tp] -> the loss, a scalar, and the sums."""
        weight, sampled, own = micro.weight, micro.sampled[:, None], None
        if self.measures_gap:
            own = vocab_parallel_logprobs(logits.detach(), sampled, self.shard)[:, 0]
            if self.importance_clip is not None:
                weight = weight * self._importance(own, micro, slice(None))
        options = LossOptions(self.chunk_tokens, inplace_backward=micro.advantage is None)
        targets = micro.targets.first(self.k)
        if self.teacher_head is None:
            total = self.loss(logits, targets, weight, self.shard, options)
        else:
            total = rebuilt_loss(self.loss, logits, targets, weight, self.shard, self.teacher_head, options)
        if micro.advantage is not None:
            trained = student_logprobs(logits, sampled, self.shard, self.chunk_tokens)
            total = total - (micro.advantage * trained[:, 0]).sum()
        return self._finished(total, own, micro)

    def of_hidden(
        self, hidden: Tensor, head: Tensor, micro: MicroBatch, sequence_parallel: bool
    ) -> tuple[Tensor, Sums[Tensor]]:
        """hidden [T, hidden size], T / tp with sequence parallelism; head [vocab / tp, hidden size] -> as above."""
        clipped = self.importance_clip is not None
        total, own = head_loss(
            self.loss,
            hidden,
            head,
            micro.targets.first(self.k),
            micro.weight,
            self.shard,
            LossOptions(self.chunk_tokens),
            sequence_parallel=sequence_parallel,
            advantage=micro.advantage,
            reweigh=(lambda own, rows: self._importance(own, micro, rows)) if clipped else None,
        )
        return self._finished(total, own if self.measures_gap else None, micro)

    def _finished(self, total: Tensor, own: Tensor | None, micro: MicroBatch) -> tuple[Tensor, Sums[Tensor]]:
        """`own` [T]: the student's log-probs of the sampled tokens, whose distance from the sampler's is the gap."""
        loss = total / self.response_tokens
        value, none = loss.detach().clone(), torch.zeros((), dtype=torch.float64, device=loss.device)
        if own is None:
            return loss, Sums(value, *[none] * 7)
        apart = (own - micro.rollout_logprobs)[micro.predicts]
        gap = apart.abs()
        largest = gap.max() if gap.numel() else none
        above = (gap > self.gap_threshold).sum()
        log_ratio = apart.double().clamp(-20, 20)
        ratio = log_ratio.exp()
        mismatch = (ratio - log_ratio - 1).sum()
        return loss, Sums(
            value, gap.sum(), above, none + gap.numel(), mismatch, ratio.sum(), (ratio * ratio).sum(), largest
        )

    def _importance(self, own: Tensor, micro: MicroBatch, rows: slice) -> Tensor:
        """Truncated importance weights, trainer over sampler, of these tokens; 1 where no response token is
        predicted."""
        ratio = (own - micro.rollout_logprobs[rows]).exp().clamp(max=self.importance_clip)
        return torch.where(micro.predicts[rows], ratio, 1.0)


def measures_gap(config: Config) -> bool:
    """Whether the gap between rollout and student log-probs is known after a step: the student's own sampler has
    none."""
    return config.rollout.engine != "megatron" or config.rollout.importance_clip is not None
