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
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.kernels import combine_log_sum_exp, compute_dtype, full_precision_chunks
from megatron_opd.losses.candidates import check_rows
from megatron_opd.losses.vocab_parallel import VocabShard, check_temperature, local_log_sum_exp, vocab_shard

Kind = Literal["full_reverse_kl", "forward_kl", "generalized_jsd"]


def _logprob_chunks(
    student: Tensor, teacher: Tensor, log_z: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, and both models' log-probs [rows, real columns] on them; log_z [tokens, 2]."""
    real = shard.real_columns()
    students = full_precision_chunks(student[:, :real], log_z.dtype, temperature, chunk_tokens)
    teachers = full_precision_chunks(teacher[:, :real], log_z.dtype, temperature, chunk_tokens)
    for (rows, s), (_, t) in zip(students, teachers):
        yield rows, s.sub_(log_z[rows, :1]), t.sub_(log_z[rows, 1:])


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


class _FullLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        weight: Tensor,
        kind: Kind,
        beta: float,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int | None,
        inplace_backward: bool,
    ) -> Tensor:
        dtype = compute_dtype(student)
        local = [local_log_sum_exp(x, shard, temperature, chunk_tokens).to(dtype) for x in (student, teacher)]
        log_z, _ = combine_log_sum_exp(torch.stack(local, dim=1), shard.group)
        sums = torch.zeros((student.shape[0], 2), dtype=dtype, device=student.device)
        for rows, logp, logq in _logprob_chunks(student, teacher, log_z, shard, temperature, chunk_tokens):
            sums[rows] = _token_sums(kind, logp, logq, beta)
        shard.sum(sums)
        weight = weight.to(dtype)
        ctx.save_for_backward(student, teacher, weight, log_z, sums[:, 1:])
        ctx.settings = (kind, beta, shard, temperature, chunk_tokens, inplace_backward)
        return torch.where(weight == 0, 0.0, weight * sums[:, 0]).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        student, teacher, weight, log_z, mean = ctx.saved_tensors
        kind, beta, shard, temperature, chunk_tokens, inplace_backward = ctx.settings
        real = shard.real_columns()
        grad = student.detach() if inplace_backward else torch.empty_like(student)
        scale = (weight * grad_outputs[0].to(weight.dtype) / temperature)[:, None]
        pruned = (weight == 0)[:, None]
        for rows, logp, logq in _logprob_chunks(student, teacher, log_z, shard, temperature, chunk_tokens):
            chunk = _logit_gradient(kind, logp, logq, mean[rows], beta).mul_(scale[rows])
            grad[rows, :real] = chunk.masked_fill_(pruned[rows], 0.0)
        grad[:, real:] = 0
        return grad, None, None, None, None, None, None, None, None


def full_vocabulary_loss(
    kind: Kind,
    student_logits: Tensor,
    teacher_logits: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    jsd_beta: float = 0.5,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Sum over tokens of weight times the divergence `kind` of the module's docstring.

    student_logits, teacher_logits [tokens, vocab / tp]: the same columns of both; only the student's carry a gradient.
    weight [tokens]: the prune weight; 0 leaves a token out.
    jsd_beta: the teacher's share of the mixture, strictly between 0 and 1 (generalized_jsd only).
    group, vocab_size, temperature, chunk_tokens, inplace_backward: as in `topk_reverse_kl`. In place, the student's
    logits are overwritten, never the teacher's.
    Returns a scalar, the same on every rank of the group. Raises ValueError on shapes or a beta that cannot be meant.
    """
    shard = vocab_shard(student_logits, group, vocab_size)
    check_rows("teacher_logits", teacher_logits, tuple(student_logits.shape))
    check_rows("weight", weight, (student_logits.shape[0],))
    check_temperature(temperature)
    if kind == "generalized_jsd" and not 0 < jsd_beta < 1:
        raise ValueError(
            f"jsd_beta {jsd_beta} must lie strictly in (0, 1); the limits are forward_kl (0) and full_reverse_kl (1)"
        )
    return _FullLoss.apply(
        student_logits,
        teacher_logits.detach(),
        weight,
        kind,
        jsd_beta,
        shard,
        temperature,
        chunk_tokens,
        inplace_backward,
    )
