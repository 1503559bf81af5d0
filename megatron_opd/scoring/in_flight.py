"""During generation: the teacher reads segments as they come, and a response whose reliability is spent stops there."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.rollout.base import Request, Sampling, Segment
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
        names = {self.teachers.name_of(r.prompt) for r in requests}
        watches = {
            name: DriftWatch(
                teacher,
                self.signal,
                prune,
                tokens,
                len(requests),
                clock,
                unstopped,
                sends_hidden=self.sends_hidden,
            )
            for name, teacher in self.teachers.models.items()
            if name in names
        }

        def watch(segments: list[Segment]) -> set[int]:
            """Each teacher, in the same order on every rank, reads the responses to its prompts."""
            stop: set[int] = set()
            for name, its_watch in watches.items():
                its_own = [s for s in segments if self.teachers.name_of(s.request.prompt) == name]
                if its_own:
                    stop |= its_watch(its_own)
            return stop

        with clock.phase("rollout"), self.teachers.resident():
            rollouts = self._generate(requests, sampling, watch)
        of = [watches[self.teachers.name_of(r.prompt)] for r in rollouts]
        rollouts = [its_watch.cut(r) for its_watch, r in zip(of, rollouts)]
        return rollouts, [its_watch.scores(r) for its_watch, r in zip(of, rollouts)]


def generated_past_drift(requests: list[Request], config: Config) -> set[int]:
    """Indices of the responses that are generated on past their drift point; with `grpo` those of whole prompts."""
    prune = config.prune
    if not prune.in_flight or prune.after_drift == "drop":
        return set()
    if prune.after_drift == "attenuate":
        return {r.index for r in requests}
    return {r.index for r in requests if r.rewarded}
