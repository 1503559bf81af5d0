"""Divergences over the whole vocabulary; both models' logits are needed, sharded alike.

With p the student's and q the teacher's distribution at a token, per token:

    full_reverse_kl   D = sum p (log p - log q)                              dD/dz_j = p_j (log p_j - log q_j - D)
    forward_kl        D = sum q (log q - log p)                              dD/dz_j = p_j - q_j
    generalized_jsd   D = b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p, b = jsd_beta, the teacher's share
                                                   dD/dz_j = (1 - b) p_j (u_j - sum p u), u = log p - log m
                      (generalised Jensen-Shannon of GKD, Agarwal et al. 2024, arXiv 2306.13649)

An id that a model gives no probability (-inf) contributes nothing to that model's own terms. A teacher that excludes
what the student allows makes the reverse KL infinite, and the reverse for the forward KL: that is reported, not
clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_opd.kernels import combine_log_sum_exp, compute_dtype, full_precision_chunks
from megatron_opd.losses.base import PLAIN, DistillTargets, Loss, LossOptions, check_shape
from megatron_opd.losses.vocab_parallel import VocabShard, local_log_sum_exp

Kind = Literal["full_reverse_kl", "forward_kl", "generalized_jsd"]


def _logprob_chunks(
    student: Tensor, teacher: Tensor, log_z: Tensor, shard: VocabShard, chunk_tokens: int | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, and both models' log-probs [rows, real columns] on them; log_z [tokens, 2]."""
    real = shard.real_columns()
    students = full_precision_chunks(student[:, :real], log_z.dtype, chunk_tokens)
    teachers = full_precision_chunks(teacher[:, :real], log_z.dtype, chunk_tokens)
    for (span, s), (_, t) in zip(students, teachers):
        yield span, s.sub_(log_z[span, :1]), t.sub_(log_z[span, 1:])


def _weighted(probability: Tensor, term: Tensor) -> Tensor:
    """probability * term, written over `probability`; 0 where the probability is 0, and a NaN stays visible."""
    excluded = probability == 0
    return probability.mul_(term).masked_fill_(excluded, 0.0)


def _mixture_gaps(logp: Tensor, logq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log m - log p and log m - log q for m = beta q + (1 - beta) p; exactly 0 where p equals q, and no overflow."""
    gap = logq - logp
    from_p = torch.log1p(beta * torch.expm1(gap.clamp(max=0)))
    from_q = torch.log1p((1 - beta) * torch.expm1((-gap).clamp(max=0)))
    below = gap <= 0
    return torch.where(below, from_p, from_q + gap), torch.where(below, from_p - gap, from_q)


def _token_sums(kind: Kind, logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """This rank's part of D and of the mean that the gradient subtracts: [tokens, 2]."""
    if kind == "full_reverse_kl":
        divergence = _weighted(logp.exp(), logp - logq).sum(1)
        return torch.stack([divergence, divergence], dim=1)
    if kind == "forward_kl":
        divergence = _weighted(logq.exp(), logq - logp).sum(1)
        return torch.stack([divergence, torch.zeros_like(divergence)], dim=1)
    gap_p, gap_q = _mixture_gaps(logp, logq, beta)
    student = _weighted(logp.exp(), -gap_p).sum(1)
    teacher = _weighted(logq.exp(), -gap_q).sum(1)
    return torch.stack([beta * teacher + (1 - beta) * student, student], dim=1)


def _logit_gradient(kind: Kind, logp: Tensor, logq: Tensor, mean: Tensor, beta: float) -> Tensor:
    """dD/dz [tokens, n], for the chunk's columns; `mean` [tokens, 1]."""
    p = logp.exp()
    if kind == "full_reverse_kl":
        return _weighted(p, logp - logq - mean)
    if kind == "forward_kl":
        return p.sub_(logq.exp())
    return _weighted(p, -_mixture_gaps(logp, logq, beta)[0] - mean).mul_(1 - beta)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weight: Tensor,
        kind: Kind,
        beta: float,
        shard: VocabShard,
        options: LossOptions,
    ) -> Tensor:
        dtype = compute_dtype(student)
        local = [local_log_sum_exp(x, shard, options.chunk_tokens).to(dtype) for x in (student, teacher)]
        log_z, _ = combine_log_sum_exp(torch.stack(local, dim=1), shard.group)
        sums = torch.zeros((student.shape[0], 2), dtype=dtype, device=student.device)
        for span, logp, logq in _logprob_chunks(student, teacher, log_z, shard, options.chunk_tokens):
            sums[span] = _token_sums(kind, logp, logq, beta)
        shard.sum(sums)
        weight = weight.to(dtype)
        ctx.save_for_backward(student, teacher, weight, log_z, sums[:, 1:])
        ctx.settings = (kind, beta, shard, options)
        return torch.where(weight == 0, 0.0, weight * sums[:, 0]).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        student, teacher, weight, log_z, mean = ctx.saved_tensors
        kind, beta, shard, options = ctx.settings
        real = shard.real_columns()
        grad = student.detach() if options.inplace_backward else torch.empty_like(student)
        scale = (weight * grad_outputs[0].to(weight.dtype))[:, None]
        pruned = (weight == 0)[:, None]
        for span, logp, logq in _logprob_chunks(student, teacher, log_z, shard, options.chunk_tokens):
            chunk = _logit_gradient(kind, logp, logq, mean[span], beta).mul_(scale[span])
            grad[span, :real] = chunk.masked_fill_(pruned[span], 0.0)
        grad[:, real:] = 0
        return grad, None, None, None, None, None, None


class _FullVocabularyLoss(Loss):
    """The divergence `kind` of the module's docstring. In place, the student's logits are overwritten, never the
    teacher's."""

    reads = "logits"
    kind: ClassVar[Kind]
    jsd_beta = 0.5  # of generalized_jsd alone

    def __call__(
        self,
        student_logits: Tensor,
        targets: DistillTargets,
        weight: Tensor,
        shard: VocabShard,
        options: LossOptions = PLAIN,
    ) -> Tensor:
        teacher_logits = targets.require(self, "teacher_logits")
        shard.check(student_logits)
        check_shape("teacher_logits", teacher_logits, tuple(student_logits.shape))
        check_shape("weight", weight, (student_logits.shape[0],))
        return _Divergence.apply(
            student_logits, teacher_logits.detach(), weight, self.kind, self.jsd_beta, shard, options
        )


class FullReverseKL(_FullVocabularyLoss):
    """`full_reverse_kl`"""

    kind = "full_reverse_kl"


class ForwardKL(_FullVocabularyLoss):
    """`forward_kl`"""

    kind = "forward_kl"


class GeneralizedJSD(_FullVocabularyLoss):
    """`generalized_jsd`; jsd_beta: the teacher's share of the mixture."""

    kind = "generalized_jsd"

    def __init__(self, jsd_beta: float = 0.5) -> None:
        if not 0 < jsd_beta < 1:
            raise ValueError(
                f"jsd_beta {jsd_beta} must lie strictly in (0, 1); the limits are forward_kl (0) and full_reverse_kl "
                "(1)"
            )
        self.jsd_beta = jsd_beta
