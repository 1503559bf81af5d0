"""prune.after_drift: grpo against an independent implementation, written from the definition in float64."""

import torch

from megatron_opd.config import parse_config
from megatron_opd.losses import DistillTargets, VocabShard, get_loss
from megatron_opd.scoring.prune_weights import add_rewards
from megatron_opd.training.microbatch import MicroBatch
from megatron_opd.training.objective import Objective
from megatron_opd.types import Prompt, Rollout, ScoredBatch

V, K = 23, 4


def rollout(index: int, length: int) -> Rollout:
    tokens = torch.arange(length) % V
    return Rollout(
        Prompt(0, "", [1]),
        index,
        tokens,
        torch.zeros(length),
        torch.zeros(length, K, dtype=torch.int64),
        torch.zeros(length, K),
        "length",
        0,
    )


def batch(lengths: list[int], effective: list[int]) -> ScoredBatch:
    rollouts = [rollout(i, n) for i, n in enumerate(lengths)]
    weights = [torch.ones(n) for n in lengths]
    return ScoredBatch(rollouts, [], weights, list(effective), effective, [0] * len(lengths), sum(lengths))


def test_advantages_are_normalised_over_a_prompts_answers_and_start_behind_the_drift_point() -> None:
    scored = batch([6, 6, 6, 6], [2, 6, 3, 4])
    add_rewards(scored, [1.0, 0.0, 0.0, 1.0], {0, 1}, copies=2, coefficient=0.5)
    rewards = torch.tensor([1.0, 0.0])
    expected = 0.5 * (rewards - rewards.mean()) / rewards.std(unbiased=False)
    torch.testing.assert_close(scored.advantage[0], torch.tensor([0.0, 0, 1, 1, 1, 1]) * expected[0], rtol=1e-4, atol=0)
    assert scored.advantage[1].abs().sum() == 0  # it never drifted: the teacher judged all of it
    assert scored.advantage[3].abs().sum() == 0  # not among the members
    assert scored.kept_length == [6, 6, 3, 4]


def test_a_prompt_whose_answers_all_get_the_same_reward_teaches_nothing_past_the_drift_point() -> None:
    scored = batch([5, 5], [2, 3])
    add_rewards(scored, [1.0, 1.0], {0, 1}, copies=2, coefficient=1.0)
    assert all(a.abs().sum() == 0 for a in scored.advantage)
    assert scored.kept_length == [2, 3]


def test_gradient_is_distillation_before_and_policy_gradient_behind_the_drift_point() -> None:
    generator = torch.Generator().manual_seed(0)
    length, drift, denominator = 9, 4, 13
    logits = torch.randn(length, V, dtype=torch.float64, generator=generator)
    ids = logits.topk(K).indices
    teacher = torch.randn(length, V, dtype=torch.float64, generator=generator).log_softmax(-1)
    sampled = torch.randint(V, (length,), generator=generator)
    weight = torch.rand(length, generator=generator) * (torch.arange(length) < drift)
    advantage = torch.where(torch.arange(length) < drift, 0.0, torch.randn((), generator=generator))

    targets = DistillTargets(ids, teacher.gather(1, ids).float(), sampled, torch.zeros(length))
    micro = MicroBatch(
        torch.zeros(length, dtype=torch.int64),
        None,
        targets,
        sampled,
        weight,
        torch.zeros(length),
        torch.ones(length, dtype=torch.bool),
        advantage,
    )
    models = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "c.jsonl"}}
    config = parse_config({**models, "loss": {"k": K, "chunk_tokens": 4}})
    objective = Objective(get_loss("topk_reverse_kl"), config, VocabShard.of(None, V), denominator)
    own = logits.clone().requires_grad_()
    loss, sums = objective.of_logits(own, micro)
    loss.backward()
    assert sums.loss == loss

    z = logits.clone().requires_grad_()
    logp = z.log_softmax(-1)
    candidates = logp.gather(1, ids)
    share = candidates.detach().softmax(-1)
    reward = share * (targets.teacher_logprobs.double() - candidates.detach())
    expected = -(weight.double()[:, None] * reward * candidates).sum()
    expected = expected - (advantage.double() * logp.gather(1, sampled[:, None])[:, 0]).sum()
    (expected / denominator).backward()
    torch.testing.assert_close(own.grad, z.grad, rtol=1e-5, atol=1e-9)
