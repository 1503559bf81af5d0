"""A loss from outside the package: its gradient is autograd's, by logits and by hidden states; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_opd.errors import ConfigError
from megatron_opd.losses import LOSSES, DistillTargets, LogprobLoss, get_loss, head_loss, vocab_shard

TOKENS, HIDDEN, VOCAB, K = 12, 6, 19, 4


class Scaled(LogprobLoss):
    """Scale times the squared gap between the log-probs, through plain autograd."""

    reads = "candidates"

    def __init__(self, scale: float = 1.0) -> None:
        if not scale > 0:
            raise ValueError(f"scale {scale} must be positive")
        self.scale = scale

    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return self.scale * (student_logprobs - teacher_logprobs).square()


class ScaledSampled(Scaled):
    reads = "sampled"


class WrongShape(Scaled):
    def terms(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return super().terms(student_logprobs, teacher_logprobs).sum(1)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    ids = torch.rand(TOKENS, VOCAB, generator=generator).topk(K).indices
    teacher = -torch.rand(TOKENS, K, generator=generator, dtype=torch.float64)
    weight = torch.rand(TOKENS, generator=generator, dtype=torch.float64)
    weight[::3] = 0
    teacher[0] = torch.nan  # a pruned token's were never filled in
    return hidden, head, DistillTargets(ids, teacher, ids[:, 0], teacher[:, 0]), weight


@pytest.mark.parametrize("own", [Scaled, ScaledSampled])
@pytest.mark.parametrize("fused_head", [False, True])
def test_the_gradient_is_autograds(own, fused_head, case):
    hidden, head, targets, weight = case
    mine, theirs = [[x.clone().requires_grad_() for x in (hidden, head)] for _ in range(2)]
    loss = get_loss(f"{own.__module__}:{own.__name__}", {"scale": 0.3})
    if fused_head:
        total, _ = head_loss(loss, *mine, targets, weight, vocab_shard(head.t()))
    else:
        logits = mine[0] @ mine[1].t()
        total = loss(logits, targets, weight, vocab_shard(logits))
    (total * 0.5).backward()
    compared = targets.student_ids if own is Scaled else targets.student_ids[:, :1]
    logp = (theirs[0] @ theirs[1].t()).log_softmax(-1).gather(1, compared)
    kept = weight > 0
    gap = (logp - targets.teacher_logprobs[:, : compared.shape[1]])[kept]
    expected = (0.3 * weight[kept, None] * gap**2).sum()
    (expected * 0.5).backward()
    torch.testing.assert_close(total, expected)
    for ours, reference in zip(mine, theirs):
        torch.testing.assert_close(ours.grad, reference.grad)


def test_terms_of_another_shape_are_refused(case):
    hidden, head, targets, weight = case
    logits = hidden @ head.t()
    with pytest.raises(ValueError, match=r"terms of WrongShape must have the shape \[12, 4\], got \[12\]"):
        WrongShape()(logits, targets, weight, vocab_shard(logits))


@pytest.mark.parametrize(
    "kind, parameters, words",
    [
        ("kl", {}, "must be one of topk_reverse_kl, sampled"),
        ("no_such_module:Loss", {}, "cannot import no_such_module"),
        (f"{__name__}:Missing", {}, "has no Missing"),
        (f"{__name__}:DistillTargets", {}, "is no subclass of megatron_opd.losses.Loss"),
        (f"{__name__}:Scaled", {"scal": 2.0}, "loss.options: .*scal.* takes scale"),
        (f"{__name__}:Scaled", {"scale": -1.0}, "scale -1.0 must be positive"),
        ("generalized_jsd", {"jsd_beta": 1.0}, "jsd_beta 1.0 must lie strictly"),
    ],
)
def test_what_is_no_loss_or_not_its_parameters_is_refused(kind, parameters, words):
    with pytest.raises(ConfigError, match=words):
        get_loss(kind, parameters)


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_for_the_config_says_what_the_classes_say(name):
    entry, loss = LOSSES[name], get_loss(name)
    assert (entry.reads, entry.fused_head) == (loss.reads, loss.fused_head)
    assert set(entry.options) == set(vars(loss))
