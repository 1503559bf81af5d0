"""What alarms look at: a step in a few numbers. The same on every rank, as what they are made of is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_opd.scoring.stop_event import student_stop_logprob
from megatron_opd.training.stop import StopPlan
from megatron_opd.types import END_DRIFT, END_EOS, END_LENGTH, Rollout, ScoredBatch

RESPONSES_READ = 64  # of a batch, for repetition: it sorts their tokens on every rank
NGRAM = 3
MANY_TOKENS = 64  # of a source's prompts, from which on it is judged by itself


@dataclass(frozen=True)
class Watched:
    """One step. A number is None where the step has nothing to take it from. Log-probs are of sampled tokens that the
    teacher has read, in nats: p the student's as its sampler gave them, q the teacher's."""

    budget: int
    from_uniform: float | None = None  # mean |log q + log of the vocabulary's size|
    # Mean |log q - log p| as a share of mean -log p, by the prompts' source: what rounding does to log-probs grows with
    # them, and a student that is sure of itself and right is no copy of its teacher.
    apart: Mapping[str, float] = field(default_factory=dict)
    first_advantage: float | None = None  # mean log q - log p of the responses' first tokens
    stop_advantage: float | None = None  # the same of sampled stops; of the event, where the loss takes it so
    entropy: float | None = None  # mean -log p: the student's entropy, estimated
    truncated: float | None = None  # share of responses that the budget cut, of those that drift did not
    finished_length: float | None = None  # mean length of the responses that ended by themselves, tokens
    repetition: float | None = None  # share of a response's 3-grams that it had before, mean over responses
    sync_gap: float | None = None  # the probe's largest gap of engine and trainer after the hand-over
    mismatch: float | None = None  # KL of engine to trainer on sampled tokens, see `Sums.mismatch`
    importance_mean: float | None = None  # mean importance weight, trainer over engine, before it is clipped
    importance_ess: float | None = None  # their effective sample size as a share of their number

    def metrics(self) -> dict[str, Any]:
        """The numbers that no other metric has; `apart` as the least of its sources."""
        numbers = {
            "teacher_from_uniform": self.from_uniform,
            "teacher_apart": min(self.apart.values(), default=None),
            "first_advantage": self.first_advantage,
            "stop_advantage": self.stop_advantage,
            "entropy": self.entropy,
            "finished_length": self.finished_length,
            "repetition": self.repetition,
        }
        return {name: value for name, value in numbers.items() if value is not None}


def watch_step(batch: ScoredBatch, metrics: Mapping[str, Any], vocab_size: int, stop: StopPlan) -> Watched:
    """The numbers of one step, whose batch has its scores and whose `metrics` are complete."""
    pairs = list(zip(batch.rollouts, batch.scores, strict=True))
    student = torch.cat([r.logprobs[: s.measured] for r, s in pairs]).double()
    teacher = torch.cat([s.sampled_logprobs[: s.measured] for _, s in pairs]).double()
    by_source: dict[str, list[torch.Tensor]] = defaultdict(list)
    for r, s in pairs:
        own, other = r.logprobs[: s.measured].double(), s.sampled_logprobs[: s.measured].double()
        by_source[r.prompt.source].append(torch.stack([(other - own).abs(), -own]))
    sums = {source: torch.cat(parts, dim=1) for source, parts in by_source.items()}
    firsts = [float(s.sampled_logprobs[0] - r.logprobs[0]) for r, s in pairs if s.measured]
    stops = [_stop_advantage(i, batch, stop) for i, (r, s) in enumerate(pairs) if _is_read_stop(r, s.measured)]
    undrifted = [r for r in batch.rollouts if r.end_reason != END_DRIFT]
    return Watched(
        budget=metrics["budget"],
        from_uniform=float((teacher + math.log(vocab_size)).abs().mean()) if len(teacher) else None,
        apart={
            s: float(gap.sum() / own.sum()) for s, (gap, own) in sums.items() if len(own) >= MANY_TOKENS and own.any()
        },
        first_advantage=mean(firsts),
        stop_advantage=mean(stops),
        entropy=float(-student.mean()) if len(student) else None,
        truncated=mean([float(r.end_reason == END_LENGTH) for r in undrifted]),
        finished_length=mean([float(len(r)) for r in undrifted if r.end_reason == END_EOS]),
        repetition=repetition(batch.rollouts),
        sync_gap=metrics.get("sync_logprob_gap"),
        mismatch=metrics.get("rollout_mismatch"),
        importance_mean=metrics.get("importance_mean"),
        importance_ess=metrics.get("importance_ess"),
    )


def _is_read_stop(rollout: Rollout, measured: int) -> bool:
    return rollout.end_reason == END_EOS and measured == len(rollout)


def _stop_advantage(index: int, batch: ScoredBatch, stop: StopPlan) -> float:
    """log q - log p of a sampled stop, or of the event of stopping where the loss takes it so."""
    rollout, scores = batch.rollouts[index], batch.scores[index]
    if stop.event and scores.stop_logprobs is not None:
        return float(scores.stop_logprobs[-1]) - student_stop_logprob(rollout, stop.student)
    return float(scores.sampled_logprobs[-1] - rollout.logprobs[-1])


def repetition(rollouts: list[Rollout]) -> float | None:
    """Share of a response's 3-grams that stand in it before, mean over responses of at least 8 tokens, of which no more
    than RESPONSES_READ are read, evenly over the batch."""
    long = [r for r in rollouts if len(r) >= 8]
    shares = []
    for r in long[:: max(1, len(long) // RESPONSES_READ)]:
        grams = torch.stack([r.tokens[i : len(r) - NGRAM + 1 + i] for i in range(NGRAM)], dim=1)
        ids = (grams[:, 0] << 42) + (grams[:, 1] << 21) + grams[:, 2]  # vocabularies have fewer than 2 million tokens
        shares.append(1 - len(ids.unique()) / len(ids))
    return mean(shares)


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
