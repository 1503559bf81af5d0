"""Token weights on worked numbers, and what they do to a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_opd.config import parse_config
from megatron_opd.errors import ConfigError
from megatron_opd.prune.token_weighting import (
    DisagreementBefore,
    EntropyOrDisagreement,
    RandomWindow,
    TokenWeighting,
    either,
    make_token_weighting,
    percentile,
    with_rest,
)
from megatron_opd.types import Prompt, Rollout, ScoredBatch, TeacherScores

MODELS = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "c.jsonl"}}


def response(
    student: Tensor, teacher: Tensor, measured: int | None = None, index: int = 0
) -> tuple[Rollout, TeacherScores]:
    """From log-probs [T, K] of the same candidates; the first one was sampled."""
    length, k = student.shape
    ids = torch.arange(k).repeat(length, 1)
    rollout = Rollout(Prompt(0, "", [1]), index, ids[:, 0], student[:, 0], ids, student, "length", 7)
    return rollout, TeacherScores(teacher, teacher[:, 0], {}, length if measured is None else measured)


def batch(pairs: list[tuple[Rollout, TeacherScores]]) -> ScoredBatch:
    rollouts, scores = [p[0] for p in pairs], [p[1] for p in pairs]
    lengths = [len(r) for r in rollouts]
    return ScoredBatch(rollouts, scores, [torch.ones(n) for n in lengths], lengths, lengths, [0], sum(lengths))


def random_logprobs(length: int, seed: int, k: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(length, 9, generator=generator)).log_softmax(-1).topk(k).values


def test_iw_on_the_worked_numbers():
    weights = DisagreementBefore(1.5).of(torch.tensor([-1.0, 1.0, -2.0, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([1.5, 1.375, 1.25, 1.0]))


def test_iw_bounds():
    gap = random_logprobs(40, 0)[:, 0] - random_logprobs(40, 1)[:, 0]
    weights = DisagreementBefore(1.5).of(gap)
    assert weights[0] == 1.5 and 40 <= weights.sum() <= 1.5 * 40
    assert bool((weights.diff() <= 0).all())
    assert bool((DisagreementBefore(1.0).of(gap) == 1).all())  # plain on-policy distillation


def test_tip_soft_or_on_the_worked_numbers():
    h, d = torch.tensor([0.5, 0.0, 0.9, 0.1]), torch.tensor([0.5, 0.9, 0.0, 0.05])
    torch.testing.assert_close(either(h, d), torch.tensor([0.75, 0.9, 0.9, 0.145]))
    assert bool((either(h, d) == either(d, h)).all()) and bool((either(h, d) >= torch.maximum(h, d)).all())


def test_tip_keeps_the_tokens_of_an_independent_computation():
    """Numbers from probabilities and the definitions, token by token, in plain Python."""
    lengths = [5, 1, 8]
    pairs = [response(random_logprobs(n, n), random_logprobs(n, 10 + n)) for n in lengths]
    weights = EntropyOrDisagreement(0.5, clip_percentile=100).weigh(*map(list, zip(*pairs)))

    entropy, apart = [], []
    for rollout, scores in pairs:
        for student, teacher in zip(rollout.topk_logprobs.tolist(), scores.logprobs.tolist()):
            p, q = [math.exp(x) for x in student], [math.exp(x) for x in teacher]
            p, q = [*p, max(1 - sum(p), 1e-8)], [*q, max(1 - sum(q), 1e-8)]
            entropy.append(-sum(x * math.log(x) for x in p))
            apart.append(sum(x * math.log(x / y) for x, y in zip(p, q)))
    h = [(x - min(entropy)) / (max(entropy) - min(entropy)) for x in entropy]
    d = [(x - min(apart)) / (max(apart) - min(apart)) for x in apart]
    s = [a + b - a * b for a, b in zip(h, d)]
    start = 0
    for n, weight in zip(lengths, weights):
        own = s[start : start + n]
        best = sorted(sorted(range(n), key=lambda i: -own[i])[: n // 2])
        assert weight.nonzero().flatten().tolist() == best
        start += n
    assert [int(w.sum()) for w in weights] == [2, 0, 4]  # floor(rho m)


def test_tip_clips_the_entropy_at_its_percentile():
    """One token's entropy stands out; clipped to the others', it no longer makes them look alike."""
    flat = torch.full((1, 5), 0.2).log()
    sure = torch.tensor([[0.96, 0.01, 0.01, 0.01, 0.01], [0.92, 0.02, 0.02, 0.02, 0.02]]).log()
    student = torch.cat([sure, flat])
    pairs = [response(student, student)]
    half = EntropyOrDisagreement(0.34, clip_percentile=50).weigh(*map(list, zip(*pairs)))[0]
    assert half.tolist() == [0.0, 1.0, 0.0]  # the second and third are equal then, and the earlier one is taken


def test_tip_keeps_nothing_that_the_teacher_has_not_read():
    rollout, scores = response(random_logprobs(8, 3), random_logprobs(8, 4), measured=4)
    weights = EntropyOrDisagreement(0.5).weigh([rollout], [scores])[0]
    assert weights[4:].sum() == 0 and weights.sum() == 2


def test_the_rest_of_the_vocabulary_is_one_candidate():
    p = torch.tensor([[0.5, 0.3]]).log()
    torch.testing.assert_close(with_rest(p).exp(), torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64))


def test_a_random_window_is_the_same_everywhere_and_moves():
    rows = [response(random_logprobs(n, n), random_logprobs(n, 1), index=i) for i, n in enumerate([40, 40, 3, 1])]
    rollouts, scores = map(list, zip(*rows))
    first, again = RandomWindow(0.25).weigh(rollouts, scores), RandomWindow(0.25).weigh(rollouts, scores)
    assert all(bool((a == b).all()) for a, b in zip(first, again))
    assert [int(w.sum()) for w in first] == [10, 10, 1, 1]
    assert all(bool((w.nonzero().flatten().diff() == 1).all()) for w in first)
    starts = {int(RandomWindow(0.25, seed).weigh(rollouts[:1], scores[:1])[0].nonzero()[0]) for seed in range(20)}
    assert len(starts) > 5


def test_what_is_dropped_leaves_the_denominator_and_the_schedule():
    pairs = [response(random_logprobs(n, n), random_logprobs(n, 20 + n), index=n) for n in (12, 20)]
    scored = batch(pairs)
    RandomWindow(0.25).apply_to(scored)
    assert scored.response_tokens == 3 + 5
    for weight, kept in zip(scored.prune_weight, scored.kept_length):
        assert kept == int(weight.nonzero()[-1]) + 1
    plain = batch(pairs)
    DisagreementBefore().apply_to(plain)
    assert plain.response_tokens == 32 and plain.kept_length == [12, 20]


def test_they_multiply_the_weights_of_drift():
    scored = batch([response(random_logprobs(4, 1), random_logprobs(4, 2))])
    scored.prune_weight = [torch.tensor([1.5, 1.0, 0.5, 0.0])]
    expected = scored.prune_weight[0] * DisagreementBefore().of(
        scored.scores[0].sampled_logprobs - scored.rollouts[0].logprobs
    )
    DisagreementBefore().apply_to(scored)
    assert bool((scored.prune_weight[0] == expected).all())


class Negative(TokenWeighting):
    """Own weights that are wrong."""

    def weigh(self, rollouts, scores):
        return [-torch.ones(len(r)) for r in rollouts]


def test_own_weights_that_are_wrong_are_refused():
    own = make_token_weighting(f"{__name__}:Negative", {})
    with pytest.raises(ValueError, match="Negative.weigh: of a response of 4 tokens"):
        own.apply_to(batch([response(random_logprobs(4, 1), random_logprobs(4, 2))]))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("iw", {"w_max": 0.5}, "w_max: 0.5 must be at least 1"),
        ("iw", {"share": 0.5}, "iw takes w_max"),
        ("tip", {"share": 0}, r"share: 0 must lie in \(0, 1\]"),
        ("torch:nn", {}, "prune.token_weighting: torch:nn"),
    ],
)
def test_what_cannot_be_built_is_named(name, options, words):
    with pytest.raises(ConfigError, match=words):
        make_token_weighting(name, options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": {"preset": "tip"}, "score": {"mode": "fused"}}, "prune.token_weighting: tip needs the whole batch"),
        ({"prune": {"preset": "off", "token_weighting_options": {"share": 1}}}, "token_weighting_options"),
        ({"prune": {"token_weighting": "topk"}}, "must be one of none, iw, tip, random_window"),
        ({"prune": {"budget": {"share": 0.5}}}, "share: 0.5 needs rule: share"),
        (
            {"prune": {"preset": "in_flight", "after_drift": "grpo", "token_weighting": "iw"}},
            "set after_drift: drop or token_weighting: none",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_when_the_config_is_read(changes, words):
    with pytest.raises(ConfigError, match=words):
        parse_config({**MODELS, **changes})


@pytest.mark.parametrize("percent", [0, 37.5, 98, 100])
def test_percentiles_are_numpys(percent):
    values = torch.rand(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(percentile(values, percent)) == pytest.approx(np.percentile(values.numpy(), percent))
