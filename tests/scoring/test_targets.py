"""What is learnt from in place of the teacher: the published numbers, what is left alone, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_opd.config import Config, ConfigError, parse_config
from megatron_opd.scoring.target import Target
from megatron_opd.scoring.targets import (
    Extrapolated,
    GroupReturns,
    Proximal,
    make_targets,
    returns_of,
    standardised,
)
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.types import Prompt, Rollout, ScoredBatch, TeacherScores

MODELS = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "p.jsonl"}}
SAMPLED = {"kind": "sampled_reverse_kl"}


def config(loss: dict[str, Any], **sections: Any) -> Config:
    return parse_config({**MODELS, "loss": loss, **sections})


def batch(own: list[list[float]], teacher: list[list[float]], measured: int | None = None) -> ScoredBatch:
    """Responses by the log-probs that student and teacher give their tokens; the token is the only candidate."""
    rollouts, scores = [], []
    for i, (p, q) in enumerate(zip(own, teacher, strict=True)):
        student, other, ids = torch.tensor(p), torch.tensor(q), torch.arange(len(p))
        rollouts.append(Rollout(Prompt(i, "", [1]), i, ids, student, ids[:, None], student[:, None], "eos", 0))
        scores.append(TeacherScores(other[:, None], other, {}, len(p) if measured is None else measured))
    lengths = [len(p) for p in own]
    return ScoredBatch(rollouts, scores, [torch.ones(n) for n in lengths], lengths, lengths, [0] * 9, sum(lengths))


@pytest.mark.parametrize(("scale", "advantage"), [(1.25, 0.75), (1.0, 0.5)])
def test_the_published_number_of_exopd(scale: float, advantage: float) -> None:
    """methods.md, section 7: log q = -1, ref = -2, p_old = -1.5."""
    given = batch([[-1.5, -1.5]], [[-1.0, -1.5]], measured=1).scores[0]
    reference = {"logprobs": torch.tensor([[-2.0]]), "sampled": torch.tensor([-2.0])}
    made = Extrapolated(scale, None, 1, False).extrapolated(given, reference)  # type: ignore[arg-type]
    assert float(made.sampled_logprobs[0]) + 1.5 == pytest.approx(advantage)
    assert float(made.logprobs[0, 0]) + 1.5 == pytest.approx(advantage)
    assert float(made.sampled_logprobs[1]) == float(made.logprobs[1, 0]) == -1.5  # not read: the student's own stays
    assert float(given.sampled_logprobs[0]) == -1.0


def test_the_published_numbers_of_a_proximal_teacher() -> None:
    ratios = [1e-30, 0.1, 1.0, 10.0]
    own = [-5.0] * 4
    given = batch([own], [[-5.0 + math.log(r) for r in ratios]])
    made = Proximal(0.2).of(given).scores[0]
    assert (made.sampled_logprobs + 5).tolist() == pytest.approx([-0.2231, -0.1985, 0, 1.0296], abs=1e-4)
    assert (made.logprobs[:, 0] + 5).tolist() == pytest.approx([-0.2231, -0.1985, 0, 1.0296], abs=1e-4)
    unchanged = Proximal(1.0).of(given).scores[0]
    assert torch.equal(unchanged.logprobs, given.scores[0].logprobs)
    nothing = Proximal(0.2).mixed(torch.tensor([-torch.inf]), torch.tensor([-1.0]))
    assert float(nothing) + 1 == pytest.approx(math.log(0.8))


def test_the_published_numbers_of_returns() -> None:
    rewards = torch.tensor([-0.2, 0.1, 0.3], dtype=torch.float64)
    returns = returns_of(rewards)
    assert returns.tolist() == pytest.approx([0, 0.4, 0.3])
    assert standardised([returns])[0].tolist() == pytest.approx([-1.121, 0.801, 0.320], abs=1e-3)
    assert standardised([returns[:1], returns[1:]])[1].tolist() == pytest.approx([0.801, 0.320], abs=1e-3)
    assert standardised([torch.ones(3)])[0].tolist() == [0, 0, 0]
    assert returns_of(rewards[:1]).tolist() == pytest.approx([-0.2]) and len(returns_of(rewards[:0])) == 0


def test_each_prompts_responses_are_standardised_among_themselves_and_weigh_the_same() -> None:
    """Prompts of 4 and of 2 tokens; each one's mean of -advantage x log p counts half."""
    own = [[0.0, 0.0], [0.0, 0.0], [0.0], [0.0]]
    given = batch(own, [[0.3, 0.1], [-0.2, 0.4], [0.5], [-0.5]])
    made = GroupReturns(2).of(given)
    first = torch.tensor([0.4, 0.1, 0.2, 0.4], dtype=torch.float64)  # returns
    expected = (first - first.mean()) / first.std() * 6 / (2 * 4)
    torch.testing.assert_close(torch.cat(made.advantage[:2]).double(), expected, atol=1e-6, rtol=1e-6)
    alone = torch.tensor([1.0, -1.0]) / math.sqrt(2) * 6 / (2 * 2)
    torch.testing.assert_close(torch.cat(made.advantage[2:]), alone)
    assert all(not w.any() for w in made.prune_weight) and given.advantage is None and given.prune_weight[0].all()


def test_what_the_teacher_has_not_read_earns_nothing() -> None:
    given = batch([[-1.0] * 4, [-1.0] * 4], [[-0.5, -2.0, -9, -9], [-1.5, -0.1, -9, -9]], measured=2)
    made = GroupReturns(2).of(given)
    assert [a[2:].tolist() for a in made.advantage] == [[0, 0]] * 2 and all(a[:2].all() for a in made.advantage)


def test_each_key_names_its_target() -> None:
    def kinds(**loss: Any) -> list[type[Target]]:
        return [type(target) for target in make_targets(config(loss), None, Teachers({}, {}))]

    assert kinds() == kinds(proximal=1.0) == kinds(reward_scale=1.0) == []
    assert kinds(proximal=0.1) == [Proximal]
    assert kinds(**SAMPLED, proximal=0.1, advantage="group") == [Proximal, GroupReturns]


@pytest.mark.parametrize(
    ("loss", "sections", "message"),
    [
        ({"reward_scale": 1.25, "proximal": 0.2}, {}, "give one of them"),
        ({"reference": "c"}, {}, "1, which is plain OPD"),
        ({"advantage": "group"}, {}, "kind: topk_reverse_kl: set sampled_reverse_kl"),
        ({"proximal": 0.2, "stop": "event"}, {}, "set stop: token"),
        ({"proximal": 0.2}, {"score": {"mode": "fused"}}, "need the scores before training"),
        ({"reward_scale": 2, "kind": "forward_kl"}, {"score": {"payload": "hidden"}}, "change log-probs of candidates"),
        (
            {**SAMPLED, "advantage": "group"},
            {"prune": {"preset": "iw"}},
            "excludes prune.token_weighting: iw; set none",
        ),
        ({**SAMPLED, "advantage": "group"}, {"rollout": {"importance_clip": 2}}, "excludes rollout.importance_clip"),
    ],
)
def test_what_does_not_go_together_is_refused(loss: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(loss, **sections)
