"""What a micro-batch is trained on, from logits and from hidden states, against the formula in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_opd.config import Config, ConfigError, parse_config
from megatron_opd.losses import DistillTargets, VocabShard
from megatron_opd.training.microbatch import MicroBatch
from megatron_opd.training.objective import Objective, Sums, build_loss
from megatron_opd.training.step import effective_share

TOKENS, HIDDEN, VOCAB, K, CLIP, THRESHOLD, RESPONSE_TOKENS = 14, 6, 23, 4, 1.2, 0.3, 17


def config_of(**loss: object) -> Config:
    return parse_config(
        {
            "student": {"model": "a"},
            "teacher": {"model": "b"},
            "data": {"prompts": "c.jsonl"},
            "loss": {"k": K, "chunk_tokens": 5, **loss},
            "rollout": {"importance_clip": CLIP, "gap_threshold": THRESHOLD},
        }
    )


@pytest.mark.parametrize("from_hidden", [False, True])
def test_importance_weights_advantage_and_gap_are_those_of_the_formula(from_hidden):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    logp = (hidden @ head.t()).log_softmax(-1)
    sampled = torch.randint(VOCAB, (TOKENS,), generator=generator)
    rollout = logp.gather(1, sampled[:, None])[:, 0] + 0.4 * torch.randn(TOKENS, generator=generator)
    predicts = torch.arange(TOKENS) % 5 > 0
    ids = torch.rand(TOKENS, VOCAB, generator=generator).topk(K + 2).indices  # two more than the loss looks at
    teacher = torch.randn(TOKENS, K + 2, generator=generator, dtype=torch.float64) - 3
    weight = torch.rand(TOKENS, generator=generator, dtype=torch.float64) * predicts
    advantage = torch.randn(TOKENS, generator=generator, dtype=torch.float64) * predicts
    targets = DistillTargets(ids, teacher, sampled, torch.zeros(TOKENS))
    micro = MicroBatch(torch.zeros(TOKENS), None, targets, sampled, weight, rollout, predicts, advantage)

    config = config_of()
    objective = Objective(build_loss(config), config, VocabShard.of(None, VOCAB), RESPONSE_TOKENS)
    mine, theirs = [[x.clone().requires_grad_() for x in (hidden, head)] for _ in range(2)]
    if from_hidden:
        loss, sums = objective.of_hidden(*mine, micro, sequence_parallel=False)
    else:
        loss, sums = objective.of_logits(mine[0] @ mine[1].t(), micro)
    loss.backward()

    logp = (theirs[0] @ theirs[1].t()).log_softmax(-1)
    own = logp.gather(1, sampled[:, None])[:, 0]
    importance = torch.where(predicts, torch.exp(own - rollout).clamp(max=CLIP), 1.0).detach()
    assert (importance == CLIP).any() and (importance[predicts] < CLIP).any()
    candidates = logp.gather(1, ids[:, :K])
    reward = candidates.detach().softmax(-1) * (teacher[:, :K] - candidates.detach())
    distillation = -(weight * importance)[:, None] * reward
    value = (distillation.sum() - (advantage * own).sum()) / RESPONSE_TOKENS
    ((distillation * candidates).sum() / RESPONSE_TOKENS - (advantage * own).sum() / RESPONSE_TOKENS).backward()
    torch.testing.assert_close(loss, value)
    for ours, reference in zip(mine, theirs):
        torch.testing.assert_close(ours.grad, reference.grad)

    gaps = [abs(float(a - b)) for a, b, p in zip(own.detach(), rollout, predicts) if p]
    assert float(sums.loss) == pytest.approx(float(value.detach()))
    assert float(sums.gap) == pytest.approx(sum(gaps)) and float(sums.gap_max) == pytest.approx(max(gaps))
    ratios = torch.exp(own.detach() - rollout)[predicts].double()
    assert float(sums.ratio) == pytest.approx(float(ratios.sum()))
    assert float(sums.ratio_squared) == pytest.approx(float((ratios**2).sum()))
    assert float(sums.mismatch) == pytest.approx(float((ratios - ratios.log() - 1).sum()))
    assert sums.gap_tokens == len(gaps) and int(sums.gap_above) == sum(gap > THRESHOLD for gap in gaps) > 0


def test_the_share_of_samples_that_importance_weights_leave():
    """methods.md, section 10: weights (1, 1, 1, 5)."""
    none = 0.0
    sums = Sums(none, none, none, gap_tokens=4, mismatch=none, ratio=8.0, ratio_squared=28.0, gap_max=none)
    assert effective_share(sums) == pytest.approx(0.571, abs=1e-3)


def test_a_loss_of_ones_own_is_checked_against_the_rest_of_the_config():
    with pytest.raises(ConfigError, match="HalfForwardKL reads the teacher's whole distribution; set score.mode"):
        build_loss(config_of(kind="tests.extending.test_add_a_loss:HalfForwardKL"))
    with pytest.raises(ConfigError, match="HalfForwardKL reads whole logits: set loss.fused_head: false"):
        build_loss(config_of(kind="tests.extending.test_add_a_loss:HalfForwardKL", fused_head=True))
