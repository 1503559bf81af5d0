"""Losses on a few candidate tokens per position: top-k reverse KL and sampled-token reverse KL.

Both have the stop-gradient form of method.md. With c(v) = weight * w(v) * (log p(v) - log q(v)) held constant,

    value     sum over tokens and candidates of c(v)                          (zero where the models agree)
    gradient  c(j) [j is a candidate] - softmax(z)_j * sum over v of c(v)     with respect to logit j, / temperature

w is the softmax of log p over the candidates, so with one candidate, the sampled token, w = 1 and this is the policy
gradient with advantage log q - log p. The log-probs are normalised over the full vocabulary; only w is renormalised.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.kernels import topk_loss_backward_
from megatron_opd.losses.vocab_parallel import VocabShard, gathered_logprobs, vocab_shard


def candidate_terms(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """w(v) (log p(v) - log q(v)) of each candidate, [tokens, n] x 2 -> [tokens, n]; their sum over n is the reverse KL.

    w = softmax of the student's log-probs over the candidates (Prune-OPD, candidate reward). A candidate that the
    student gives no probability contributes nothing, whatever the teacher says of it; NaN stays NaN.
    """
    w = torch.softmax(student_logprobs, dim=-1)
    return torch.where(w == 0, 0.0, w * (student_logprobs - teacher_logprobs))


def weighted_terms(student_logprobs: Tensor, teacher_logprobs: Tensor, weight: Tensor) -> Tensor:
    """c(v) of the module's docstring, [tokens, n]: its sum is the loss, and it is the derivative by each log-prob.

    A pruned token, weight [tokens] 0, counts for nothing, even where its teacher log-probs were never filled in.
    """
    factor = weight.to(student_logprobs.dtype)[:, None]
    terms = factor * candidate_terms(student_logprobs, teacher_logprobs.to(student_logprobs.dtype))
    return torch.where(factor == 0, 0.0, terms)


def check_rows(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")


class _Logprobs(torch.autograd.Function):
    """Log-probs of ids [tokens, n]; backward: sum over v of g(v) ([j = v] - softmax(z)_j), chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        shard: VocabShard,
        temperature: float,
        chunk_tokens: int | None,
        inplace_backward: bool,
    ) -> Tensor:
        logprobs, log_z = gathered_logprobs(logits, ids, shard, temperature, chunk_tokens)
        ctx.save_for_backward(logits, ids, log_z)
        ctx.settings = (shard, temperature, chunk_tokens, inplace_backward)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        logits, ids, log_z = ctx.saved_tensors
        shard, temperature, chunk_tokens, inplace_backward = ctx.settings
        grad = topk_loss_backward_(
            logits.detach(),
            log_z,
            ids - shard.offset,
            grad_outputs[0],
            shard.real_columns(),
            temperature=temperature,
            out=None if inplace_backward else torch.empty_like(logits),
            chunk_tokens=chunk_tokens,
        )
        return grad, None, None, None, None, None


class _Surrogate(torch.autograd.Function):
    """Value: the sum of the coefficients. Gradient: the coefficients, as that of sum(coefficients * logprobs)."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients)
        return coefficients.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (coefficients,) = ctx.saved_tensors
        return coefficients * grad_outputs[0], None


def student_logprobs(
    student_logits: Tensor,
    ids: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """`vocab_parallel_logprobs` with a gradient, for ids [tokens, n]: what policy-gradient terms are built from.

    The other arguments are those of `topk_reverse_kl`.
    """
    shard = vocab_shard(student_logits, group, vocab_size)
    return _Logprobs.apply(student_logits, ids, shard, temperature, chunk_tokens, inplace_backward)


def topk_reverse_kl(
    student_logits: Tensor,
    student_ids: Tensor,
    teacher_logprobs: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Top-k reverse KL with the stop-gradient of the method, summed over tokens.

    student_logits [tokens, vocab / tp]: this rank's columns, any floating dtype; sums run in float32 (float64 for
    float64).
    student_ids [tokens, k]: global ids of the student's most likely tokens; a negative id stands for "no candidate".
    teacher_logprobs [tokens, k]: the teacher's log-probs of them, normalised over the full vocabulary, at
    `temperature`.
    weight [tokens]: the prune weight L_t; 0 leaves a token out.
    group: the tensor-parallel group; None means that the logits are whole.
    vocab_size: ids from here on are padding. chunk_tokens: tokens held in full precision at a time; None picks it.
    inplace_backward: the gradient overwrites the logits. The caller promises that nothing reads them after this
    backward.
    Returns a scalar, the same on every rank of the group; the gradient needs no collective.
    Source: method.md (Prune-OPD, arXiv 2605.07804), the base loss with L_t.
    """
    check_rows("teacher_logprobs", teacher_logprobs, tuple(student_ids.shape))
    check_rows("weight", weight, (student_logits.shape[0],))
    logprobs = student_logprobs(
        student_logits,
        student_ids,
        group,
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        inplace_backward=inplace_backward,
    )
    return _Surrogate.apply(logprobs, weighted_terms(logprobs.detach(), teacher_logprobs.detach(), weight.detach()))


def sampled_reverse_kl(
    student_logits: Tensor,
    sampled_ids: Tensor,
    teacher_sampled_logprobs: Tensor,
    weight: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Reverse KL estimated on the sampled token, summed over tokens.

    The gradient is that of -weight * advantage * log p(y) with the advantage log q(y) - log p(y) held constant; the
    value is weight * (log p(y) - log q(y)).

    sampled_ids, teacher_sampled_logprobs [tokens]: the sampled token y and the teacher's log-prob of it.
    The other arguments are those of `topk_reverse_kl`.
    """
    tokens = student_logits.shape[0]
    check_rows("sampled_ids", sampled_ids, (tokens,))
    check_rows("teacher_sampled_logprobs", teacher_sampled_logprobs, (tokens,))
    return topk_reverse_kl(
        student_logits,
        sampled_ids[:, None],
        teacher_sampled_logprobs[:, None],
        weight,
        group,
        vocab_size=vocab_size,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        inplace_backward=inplace_backward,
    )
