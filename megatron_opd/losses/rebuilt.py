"""Losses over the whole vocabulary from the teacher's hidden states: its logits exist for a chunk of tokens at a time.

The teacher sends what its output layer reads, 2 bytes x hidden size a token in bfloat16 where its logits in float32 are
4 bytes x vocabulary. The training ranks hold its output layer, split as the student's vocabulary is. The forward makes
a chunk's logits, the loss and the gradient by the student's logits, and drops the chunk; the backward scales what is
there. Beside the student's logits and their gradient, which take each other's place, that is two chunks
[chunk, vocab / tp]: the teacher's logits and the chunk's gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_opd.losses.base import PLAIN, DistillTargets, Loss, LossOptions
from megatron_opd.losses.vocab_parallel import VocabShard

CHUNK_TOKENS = 1024  # where the options do not say


class _Rebuilt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        loss: Loss,
        targets: DistillTargets,
        weight: Tensor,
        shard: VocabShard,
        teacher_head: Tensor,
        options: LossOptions,
    ) -> Tensor:
        hidden = targets.require(loss, "teacher_hidden")
        logits = student_logits.detach()
        grad = logits if options.inplace_backward else torch.empty_like(logits)
        total = None
        inner = LossOptions(options.chunk_tokens)
        chunk = options.chunk_tokens or CHUNK_TOKENS
        for start in range(0, len(logits), chunk):
            tokens = slice(start, start + chunk)
            part = replace(
                targets.of_tokens(tokens), teacher_logits=hidden[tokens] @ teacher_head.t(), teacher_hidden=None
            )
            with torch.enable_grad():
                leaf = logits[tokens].detach().requires_grad_()
                value = loss(leaf, part, weight[tokens], shard, inner)
                (grad[tokens],) = torch.autograd.grad(value, leaf)
            total = value.detach() if total is None else total + value.detach()
        ctx.save_for_backward(grad)
        return logits.new_zeros((), dtype=torch.float32) if total is None else total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(grad_outputs[0].to(grad.dtype)), None, None, None, None, None, None


def rebuilt_loss(
    loss: Loss,
    student_logits: Tensor,
    targets: DistillTargets,
    weight: Tensor,
    shard: VocabShard,
    teacher_head: Tensor,
    options: LossOptions = PLAIN,
) -> Tensor:
    """`loss`, which reads the teacher's logits, from `targets.teacher_hidden` [tokens, teacher's hidden size].

    Args:
        student_logits: [tokens, vocab / tp]; with `options.inplace_backward` overwritten here already, in the forward.
        weight: [tokens] prune weights.
        teacher_head: [vocab / tp, teacher's hidden size], without gradient, its rows split as the student's columns.

    Returns the loss summed over tokens, as `Loss` does, the same on every rank of the group; its gradient reaches the
    student's logits alone. Once only: a second backward would scale what the first has scaled.
    """
    return _Rebuilt.apply(student_logits, loss, targets, weight, shard, teacher_head.detach(), options)
