"""What a response counts for beside others: several teachers' shares, means over responses, a bound on the advantage.

    TeacherShares  loss.teacher_shares, loss.disagreement: Open-MOPD's token balance and disagreement weight
    SequenceMean   loss.mean: sequence
    Clipped        loss.advantage_clip

Like the targets of targets.py, each makes the batch that is trained on; drift, metrics and alarms see the plain one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_opd.config import Config
from megatron_opd.scoring.target import Target
from megatron_opd.scoring.teachers import Teachers
from megatron_opd.types import Rollout, ScoredBatch, TeacherScores

DECAY = 0.9  # of the running mean distances; the paper's is not public
LEAST, MOST = 0.05, 20.0  # bounds of a teacher's disagreement weight


class TeacherShares(Target):
    """A teacher's tokens are weighed by w = share wanted / share of the batch's tokens, times
    clamp((m / mean of all m)^a, 0.05, 20), m the running mean of its |log q - log p| on sampled tokens; then all
    weights by one factor, so that their mean over the tokens is what it was (Open-MOPD, arXiv 2608.19098)."""

    def __init__(self, teachers: Teachers, shares: dict[str, float], exponent: float) -> None:
        """shares: of each teacher, of any sum; none: as the tokens come. exponent: a; 0: no disagreement weight."""
        self.teachers, self.exponent = teachers, exponent
        total = sum(shares.values())
        self.shares = {name: share / total for name, share in shares.items()}
        self.distance: dict[str, float] = {}  # running means, nats
        self.weights: dict[str, float] = {}  # of the last batch

    def of(self, batch: ScoredBatch) -> ScoredBatch:
        members = self.teachers.members(batch.rollouts)
        tokens = {name: sum(len(batch.rollouts[i]) for i in of_it) for name, of_it in members.items()}
        self._measure(batch, members)
        self.weights = balanced(tokens, self.shares, self.distance, self.exponent)
        factors = {i: self.weights[name] for name, of_it in members.items() for i in of_it}
        return _scaled(batch, [factors[i] for i in range(len(batch.rollouts))])

    def _measure(self, batch: ScoredBatch, members: dict[str, list[int]]) -> None:
        for name, of_it in members.items():
            gaps = [_distance(batch.rollouts[i], batch.scores[i]) for i in of_it if batch.scores[i].measured]
            if gaps:
                now = float(torch.cat(gaps).mean())
                self.distance[name] = DECAY * self.distance[name] + (1 - DECAY) * now if name in self.distance else now

    def state_dict(self) -> dict[str, Any]:
        return {"distance": dict(self.distance)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.distance = dict(state["distance"])


def balanced(
    tokens: dict[str, int], shares: dict[str, float], distance: dict[str, float], exponent: float
) -> dict[str, float]:
    """The weights of the teachers that have tokens. A teacher without any leaves its share to the others."""
    total = sum(tokens.values())
    actual = {name: count / total for name, count in tokens.items()}
    wanted = {name: shares[name] for name in tokens} if shares else actual
    norm = sum(wanted.values())
    weights = {name: wanted[name] / norm / actual[name] for name in tokens}
    if exponent and all(distance.get(name) for name in tokens):
        mean = sum(distance[name] for name in tokens) / len(tokens)
        factor = {name: min(max((distance[name] / mean) ** exponent, LEAST), MOST) for name in tokens}
        before = sum(actual[name] * weights[name] for name in tokens)
        weights = {name: weights[name] * factor[name] for name in tokens}
        after = sum(actual[name] * weights[name] for name in tokens)
        weights = {name: weight * before / after for name, weight in weights.items()}
    return weights


class SequenceMean(Target):
    """Every response counts alike, with the mean over its tokens; the step divides by the batch's tokens."""

    def of(self, batch: ScoredBatch) -> ScoredBatch:
        count = len(batch.rollouts)
        return _scaled(batch, [batch.response_tokens / (count * len(r)) for r in batch.rollouts])


class Clipped(Target):
    """The teacher's log-probs no further than `bound` nats from the sampler's."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def of(self, batch: ScoredBatch) -> ScoredBatch:
        scores = []
        for r, s in zip(batch.rollouts, batch.scores, strict=True):
            logprobs, sampled = self.near(s.logprobs, r.topk_logprobs), self.near(s.sampled_logprobs, r.logprobs)
            scores.append(replace(s, logprobs=logprobs, sampled_logprobs=sampled))
        return replace(batch, scores=scores)

    def near(self, teacher: Tensor, sampler: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(teacher, sampler - self.bound), sampler + self.bound)


def _scaled(batch: ScoredBatch, factors: list[float]) -> ScoredBatch:
    """Every term of a response times its factor: the distillation loss's, those of rewards and of stops."""
    weights = [w * factor for w, factor in zip(batch.prune_weight, factors, strict=True)]
    advantage = batch.advantage
    if advantage is not None:
        advantage = [a * factor for a, factor in zip(advantage, factors, strict=True)]
    return replace(batch, prune_weight=weights, advantage=advantage)


def _distance(rollout: Rollout, scores: TeacherScores) -> Tensor:
    n = scores.measured
    return (scores.sampled_logprobs[:n] - rollout.logprobs[:n]).double().abs()


def response_weights(config: Config, teachers: Teachers) -> list[Target]:
    """What the config names, in the order in which it is applied."""
    loss = config.loss
    targets: list[Target] = []
    if loss.advantage_clip is not None:
        targets.append(Clipped(loss.advantage_clip))
    if loss.mean == "sequence":
        targets.append(SequenceMean())
    if loss.teacher_shares or loss.disagreement:
        targets.append(TeacherShares(teachers, loss.teacher_shares, loss.disagreement))
    return targets
