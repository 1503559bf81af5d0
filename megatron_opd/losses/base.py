"""What a distillation loss is: the one calling convention, and what a loss of one's own has to bring along.

    loss = get_loss(kind, parameters)
    total = loss(student_logits, targets, weight, shard, options)      # or head_loss(loss, hidden, head, ...)

returns the SUM over this rank's tokens; the training step divides by the response tokens of the global batch.

Most losses compare a few log-probs per token: subclass `LogprobLoss` and write `terms`; whole logits, `loss.fused_head`
and fused scoring follow. A loss that reads the student's whole distribution subclasses `Loss` and writes `__call__`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from megatron_opd.losses.vocab_parallel import VocabShard, student_logprobs
from megatron_opd.plugins import Reads


@dataclass(frozen=True)
class DistillTargets:
    """What the teacher and the rollout hand to a loss, for one micro-batch; a loss names what it misses.

    student_ids, teacher_logprobs [tokens, k]: the student's candidates (global ids) and the teacher's log-probs of
    them.
    sampled_ids, teacher_sampled_logprobs [tokens]: the sampled token and the teacher's log-prob of it.
    teacher_logits [tokens, vocab / tp]: sharded as the student's, for losses that read "logits".
    teacher_hidden [tokens, teacher's hidden size]: what the teacher's output layer reads, see `losses/rebuilt.py`.
    """

    student_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    sampled_ids: Tensor | None = None
    teacher_sampled_logprobs: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_hidden: Tensor | None = None

    def first(self, k: int) -> DistillTargets:
        """These targets with the k most likely candidates alone."""
        if self.student_ids is None or self.teacher_logprobs is None:
            return self
        return replace(self, student_ids=self.student_ids[:, :k], teacher_logprobs=self.teacher_logprobs[:, :k])

    def of_tokens(self, tokens: slice) -> DistillTargets:
        """These targets for some of the tokens."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return DistillTargets(**{name: None if value is None else value[tokens] for name, value in parts.items()})

    def require(self, loss: Loss, field: str) -> Tensor:
        """The tensor in `field`; raises ValueError naming the loss that needs it."""
        value = getattr(self, field)
        if value is None:
            raise ValueError(f"loss {type(loss).__name__} needs DistillTargets.{field}, which is None")
        return value


@dataclass(frozen=True)
class LossOptions:
    """How a loss is computed. Nothing here changes its value."""

    chunk_tokens: int | None = None
    """Tokens held in full precision at a time; with a fused head, tokens whose logits exist. None picks it."""
    inplace_backward: bool = False
    """The gradient overwrites the student's logits. The caller promises that nothing reads them after the backward."""


PLAIN = LossOptions()


class Loss(ABC):
    """A distillation loss. Its parameters are the arguments of its constructor, which raises ValueError for a bad one.

    reads: what it needs of the teacher, see `plugins.Reads`.
    fused_head: whether `head_loss` can compute it, without whole logits.
    """

    reads: ClassVar[Reads]
    fused_head: ClassVar[bool] = False

    @abstractmethod
    def __call__(
        self,
        student_logits: Tensor,
        targets: DistillTargets,
        weight: Tensor,
        shard: VocabShard,
        options: LossOptions = PLAIN,
    ) -> Tensor:
        """The loss summed over tokens, a scalar with a gradient by the logits, the same on every rank of the group.

        student_logits [tokens, vocab / tp]: this rank's columns, any floating dtype.
        weight [tokens]: the prune weight; 0 leaves a token out, whatever its logits and targets hold.
        """


class LogprobLoss(Loss):
    """A loss on the log-probs of a few tokens per position: the candidates ("candidates"), or the sampled token."""

    fused_head = True

    @abstractmethod
    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """The loss of each token in parts that sum to it: [tokens, n] x 2 -> [tokens, n], n = k or 1.

        Plain torch: autograd finds the gradient by the student's log-probs (`constant_terms` holds a factor constant).
        Both are normalised over the full vocabulary, in float32 (float64 for float64 logits).
        """

    def ids(self, targets: DistillTargets) -> Tensor:
        """The token ids [tokens, n] whose log-probs are compared."""
        if self.reads == "candidates":
            return targets.require(self, "student_ids")
        return targets.require(self, "sampled_ids")[:, None]

    def teacher_logprobs(self, targets: DistillTargets) -> Tensor:
        """The teacher's log-probs [tokens, n] of them."""
        if self.reads == "candidates":
            logprobs = targets.require(self, "teacher_logprobs")
        else:
            logprobs = targets.require(self, "teacher_sampled_logprobs")[:, None]
        check_shape("the teacher's log-probs", logprobs, tuple(self.ids(targets).shape))
        return logprobs

    def value_and_slope(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss summed over tokens, and its derivatives [tokens, n] by the student's log-probs, without a graph."""
        dtype = student_logprobs.dtype
        factor = weight.detach().to(dtype)[:, None]
        with torch.enable_grad():
            leaf = student_logprobs.detach().requires_grad_()
            terms = self.terms(leaf, teacher_logprobs.detach().to(dtype))
            check_shape(f"terms of {type(self).__name__}", terms, tuple(leaf.shape))
            value = torch.where(factor == 0, 0.0, factor * terms).sum()
            (slope,) = torch.autograd.grad(value, leaf)
        return value.detach(), torch.where(factor == 0, 0.0, slope)

    def __call__(
        self,
        student_logits: Tensor,
        targets: DistillTargets,
        weight: Tensor,
        shard: VocabShard,
        options: LossOptions = PLAIN,
    ) -> Tensor:
        check_shape("weight", weight, (student_logits.shape[0],))
        ids, teacher = self.ids(targets), self.teacher_logprobs(targets)
        logprobs = student_logprobs(student_logits, ids, shard, options.chunk_tokens, options.inplace_backward)
        return _WithSlope.apply(logprobs, *self.value_and_slope(logprobs, teacher, weight))


class _WithSlope(torch.autograd.Function):
    """A value and its derivatives by the log-probs, both known already."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad_outputs[0], None, None


class _ConstantTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients)
        return coefficients.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (coefficients,) = ctx.saved_tensors
        return grad_outputs[0] * coefficients, None


def constant_terms(logprobs: Tensor, coefficients: Tensor) -> Tensor:
    """Terms with the value `coefficients` and the gradient of coefficients * logprobs, the coefficients held constant.

    This is the stop-gradient of policy-gradient losses; both [tokens, n].
    """
    return _ConstantTerms.apply(logprobs, coefficients.detach())


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")
