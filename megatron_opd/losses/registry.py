"""The distillation losses by name, behind one calling convention.

    loss = get_loss(name)(student_logits, targets, weight, group, vocab_size=...)

returns the SUM over this rank's tokens; the training step divides by `global_token_count`. Here `inplace_backward`
defaults to True, as the training step wants it: the gradient overwrites the student's logits, which nobody may read
after the backward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.losses.candidates import sampled_reverse_kl, topk_reverse_kl
from megatron_opd.losses.full_vocabulary import Kind, full_vocabulary_loss


@dataclass(frozen=True)
class DistillTargets:
    """What the teacher and the rollout hand to a loss, for one micro-batch; a loss names what it misses.

    student_ids, teacher_logprobs [tokens, k]: the student's candidates (global ids) and the teacher's log-probs of
    them.
    sampled_ids, teacher_sampled_logprobs [tokens]: the sampled token and the teacher's log-prob of it.
    teacher_logits [tokens, vocab / tp]: sharded as the student's, for the full-vocabulary losses.
    importance [tokens]: truncated importance weights, trainer over sampler; they multiply the prune weight.
    jsd_beta: the teacher's share in generalized_jsd's mixture.
    """

    student_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    sampled_ids: Tensor | None = None
    teacher_sampled_logprobs: Tensor | None = None
    teacher_logits: Tensor | None = None
    importance: Tensor | None = None
    jsd_beta: float = 0.5

    def first(self, k: int) -> DistillTargets:
        """These targets with the k most likely candidates alone."""
        if self.student_ids is None or self.teacher_logprobs is None:
            return self
        return replace(self, student_ids=self.student_ids[:, :k], teacher_logprobs=self.teacher_logprobs[:, :k])

    def require(self, loss: str, field: str) -> Tensor:
        """The tensor in `field`; raises ValueError naming the loss that needs it."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"loss {loss} needs DistillTargets.{field}, which is None")
        return value

    def weighted(self, weight: Tensor) -> Tensor:
        """The prune weight [tokens] times the importance weights, where there are any."""
        return weight if self.importance is None else weight * self.importance.detach()


class Loss(Protocol):
    def __call__(
        self,
        student_logits: Tensor,
        targets: DistillTargets,
        weight: Tensor,
        group: dist.ProcessGroup | None = None,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        chunk_tokens: int | None = None,
        inplace_backward: bool = True,
    ) -> Tensor: ...


def _topk_reverse_kl(
    student_logits: Tensor,
    targets: DistillTargets,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    inplace_backward: bool = True,
) -> Tensor:
    return topk_reverse_kl(
        student_logits,
        targets.require("topk_reverse_kl", "student_ids"),
        targets.require("topk_reverse_kl", "teacher_logprobs"),
        targets.weighted(weight),
        group,
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        inplace_backward=inplace_backward,
    )


def _sampled_reverse_kl(
    student_logits: Tensor,
    targets: DistillTargets,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    inplace_backward: bool = True,
) -> Tensor:
    return sampled_reverse_kl(
        student_logits,
        targets.require("sampled_reverse_kl", "sampled_ids"),
        targets.require("sampled_reverse_kl", "teacher_sampled_logprobs"),
        targets.weighted(weight),
        group,
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        inplace_backward=inplace_backward,
    )


def _full(kind: Kind) -> Loss:
    def loss(
        student_logits: Tensor,
        targets: DistillTargets,
        weight: Tensor,
        group: dist.ProcessGroup | None = None,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        chunk_tokens: int | None = None,
        inplace_backward: bool = True,
    ) -> Tensor:
        return full_vocabulary_loss(
            kind,
            student_logits,
            targets.require(kind, "teacher_logits"),
            targets.weighted(weight),
            group,
            jsd_beta=targets.jsd_beta,
            vocab_size=vocab_size,
            temperature=temperature,
            chunk_tokens=chunk_tokens,
            inplace_backward=inplace_backward,
        )

    return loss


LOSSES: dict[str, Loss] = {
    "topk_reverse_kl": _topk_reverse_kl,
    "sampled_reverse_kl": _sampled_reverse_kl,
    "full_reverse_kl": _full("full_reverse_kl"),
    "forward_kl": _full("forward_kl"),
    "generalized_jsd": _full("generalized_jsd"),
}


def get_loss(name: str) -> Loss:
    """The loss called `name`; raises ValueError listing the names there are."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; one of {', '.join(LOSSES)}")
    return LOSSES[name]


def global_token_count(
    response_tokens: int | Tensor, group: dist.ProcessGroup | None = None, device: str = "cpu"
) -> Tensor:
    """Response tokens of the global batch, the denominator of every loss: an int64 scalar, at least 1.

    response_tokens: this rank's count; tokens with prune weight 0 count too (the method does not renormalise).
    group: the ranks that hold different tokens (data- and context-parallel); None means this rank has them all.
    The minimum of 1 lets a batch with nothing in it give a zero loss instead of NaN.
    """
    count = torch.as_tensor(response_tokens, dtype=torch.int64, device=device).sum()
    if group is not None:
        dist.all_reduce(count, group=group)
    return count.clamp_(min=1)
