"""During generation: the teacher reads segments as they come, and a response whose reliability is spent stops there."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.rollout.base import Request, Sampling
from megatron_opd.scoring.base import Clock, Scoring
from megatron_opd.scoring.drift_watch import DriftWatch
from megatron_opd.types import Rollout, TeacherScores


class InFlightScoring(Scoring):
    """The engine shows every running response to the teacher each `prune.segment` tokens."""

    def generate_and_score(
        self, requests: list[Request], sampling: Sampling, clock: Clock
    ) -> tuple[list[Rollout], list[TeacherScores]]:
        config, prune = self.config, self.config.prune
        unstopped = generated_past_drift(requests, config)
        tokens = config.train.tokens_per_microbatch
        watch = DriftWatch(
            self.teacher,
            self.signal,
            prune,
            tokens,
            len(requests),
            clock,
            unstopped,
            sends_hidden=self.sends_hidden,
        )
        with clock.phase("rollout"), self.teacher.resident():
            rollouts = self._generate(requests, sampling, watch)
        rollouts = [watch.cut(r) for r in rollouts]
        return rollouts, [watch.scores(r) for r in rollouts]


def generated_past_drift(requests: list[Request], config: Config) -> set[int]:
    """Indices of the responses that are generated on past their drift point; with `grpo` those of whole prompts."""
    prune = config.prune
    if not prune.in_flight or prune.after_drift == "drop":
        return set()
    if prune.after_drift == "attenuate":
        return {r.index for r in requests}
    return {r.index for r in requests if r.rewarded}
