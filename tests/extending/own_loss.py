"""A loss: the method's reverse KL, no candidate of which pulls harder than `limit` nats."""

from __future__ import annotations

from torch import Tensor

from megatron_opd.losses import LogprobLoss, constant_terms


class ClippedReverseKL(LogprobLoss):
    reads = "candidates"  # of the teacher: its log-probs of the student's k most likely tokens; or "sampled"

    def __init__(self, limit: float = 2.0) -> None:  # loss.options: {limit: 0.5}
        if not limit > 0:
            raise ValueError(f"limit {limit} must be positive")
        self.limit = limit

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """[tokens, k] twice -> [tokens, k], whose sum over k is the loss of a token."""
        share = student_logprobs.softmax(-1)
        gap = (student_logprobs - teacher_logprobs).clamp(-self.limit, self.limit)
        return constant_terms(student_logprobs, share * gap)  # a policy gradient: the gap is not differentiated
