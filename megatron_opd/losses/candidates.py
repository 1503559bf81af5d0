"""Losses on a few candidate tokens per position: top-k reverse KL and sampled-token reverse KL.

Both have the stop-gradient form of docs/method.md. With c(v) = weight * w(v) * (log p(v) - log q(v)) held constant,

    value     sum over tokens and candidates of c(v)                          (zero where the models agree)
    gradient  c(j) [j is a candidate] - softmax(z)_j * sum over v of c(v)     with respect to logit j

w is the softmax of log p over the candidates, so with one candidate, the sampled token, w = 1 and this is the policy
gradient with advantage log q - log p. The log-probs are normalised over the full vocabulary; only w is renormalised.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.losses.base import DistillTargets, LogprobLoss, LossOptions, constant_terms
from megatron_opd.losses.vocab_parallel import vocab_shard
from megatron_opd.plugins import Reads


def candidate_terms(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """w(v) (log p(v) - log q(v)) of each candidate, [tokens, n] x 2 -> [tokens, n]; their sum over n is the reverse KL.

    w = softmax of the student's log-probs over the candidates (Prune-OPD, candidate reward). A candidate that the
    student gives no probability contributes nothing, whatever the teacher says of it; NaN stays NaN.
    """
    w = torch.softmax(student_logprobs, dim=-1)
    return torch.where(w == 0, 0.0, w * (student_logprobs - teacher_logprobs))


class TopkReverseKL(LogprobLoss):
    """`topk_reverse_kl`: the method's loss, over the student's k most likely tokens."""

    reads: ClassVar[Reads] = "candidates"

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return constant_terms(student_logprobs, candidate_terms(student_logprobs, teacher_logprobs))


class SampledReverseKL(TopkReverseKL):
    """`sampled_reverse_kl`: the reverse KL estimated on the sampled token.

    The gradient is that of -weight * advantage * log p(y) with the advantage log q(y) - log p(y) held constant; the
    value is weight * (log p(y) - log q(y)).
    """

    reads: ClassVar[Reads] = "sampled"


def topk_reverse_kl(
    student_logits: Tensor,
    student_ids: Tensor,
    teacher_logprobs: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Top-k reverse KL with the stop-gradient of the method, summed over tokens.

    student_logits [tokens, vocab / tp]: this rank's columns, any floating dtype; sums run in float32 (float64 for
    float64).
    student_ids [tokens, k]: global ids of the student's most likely tokens; a negative id stands for "no candidate".
    teacher_logprobs [tokens, k]: the teacher's log-probs of them, normalised over the full vocabulary.
    weight [tokens]: the prune weight L_t; 0 leaves a token out.
    group: the tensor-parallel group; None means that the logits are whole.
    vocab_size: ids from here on are padding. chunk_tokens, inplace_backward: see `LossOptions`.
    Returns a scalar, the same on every rank of the group; the gradient needs no collective.
    Source: docs/method.md (Prune-OPD, arXiv 2605.07804), the base loss with L_t.
    """
    targets = DistillTargets(student_ids=student_ids, teacher_logprobs=teacher_logprobs)
    shard = vocab_shard(student_logits, group, vocab_size)
    return TopkReverseKL()(student_logits, targets, weight, shard, LossOptions(chunk_tokens, inplace_backward))
