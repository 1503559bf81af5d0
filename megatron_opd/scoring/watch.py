"""Answers and the teacher's scores of them: one after the other, or, in flight, at the same time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from megatron_opd.config import Config, PruneConfig
from megatron_opd.models.build import Model
from megatron_opd.parallel.exchange import Fields
from megatron_opd.prune import ReliabilityState
from megatron_opd.rollout.base import Request, RolloutEngine, Sampling, Segment
from megatron_opd.scoring.incremental import SegmentScorer
from megatron_opd.scoring.separate import score_rollouts
from megatron_opd.scoring.view import to_scores
from megatron_opd.types import Rollout, TeacherScores


class Clock(Protocol):
    def phase(self, name: str) -> AbstractContextManager[None]: ...


def score(
    engine: RolloutEngine, teacher: Model, requests: list[Request], sampling: Sampling, config: Config, clock: Clock
) -> tuple[list[Rollout], list[TeacherScores]]:
    """Generates and scores one step's answers; collective, the same result on every rank."""
    prune, tokens = config.prune, config.train.tokens_per_microbatch
    if not prune.in_flight:
        with clock.phase("rollout"):
            engine.wake()
            rollouts = engine.generate(requests, sampling)
            engine.sleep()
        with clock.phase("score"):
            return rollouts, score_rollouts(teacher, rollouts, prune, tokens)
    watcher = Watcher(teacher, prune, tokens, len(requests), clock)
    with clock.phase("rollout"):
        engine.wake()
        rollouts = engine.generate(requests, sampling, watcher, prune.segment)
        engine.sleep()
    return [watcher.cut(r) for r in rollouts], [watcher.scores(r.index) for r in rollouts]


class Watcher:
    """Judges running answers segment by segment and names those whose reliability is spent."""

    def __init__(self, teacher: Model, prune: PruneConfig, tokens: int, answers: int, clock: Clock) -> None:
        self.prune, self.clock = prune, clock
        places = -(-answers // teacher.layout.data_size)
        self.scorer = SegmentScorer(teacher, prune, tokens, places)
        self.state = ReliabilityState(answers, prune.threshold, prune.w_drop, prune.w_base)
        self.found: dict[int, list[Fields]] = {}

    def __call__(self, segments: list[Segment]) -> set[int]:
        with self.clock.phase("score"):
            views = self.scorer.score(segments)
            stop = set()
            for segment in segments:
                index = segment.request.index
                view = views[index]
                self.found.setdefault(index, []).append(view)
                events = self._events(view)[None]
                self.state.update_from_events(events, torch.ones_like(events), torch.tensor([index]))
                if bool(self.state.spent[index]):
                    stop.add(index)
                    self.scorer.release(index)
        return stop

    def _events(self, view: Fields) -> torch.Tensor:
        return ~view["accepted"] if self.prune.signal == "teacher_top_p" else view["overlap"] < self.prune.threshold

    def scores(self, index: int) -> TeacherScores:
        """All segments' scores of one answer, up to where `cut` ends it."""
        parts = self.found[index]
        length = self._length(index, sum(p["overlap"].numel() for p in parts))
        return to_scores({name: torch.cat([p[name] for p in parts])[:length] for name in parts[0]})

    def cut(self, rollout: Rollout) -> Rollout:
        """The answer without what its last segment holds behind the drift point."""
        n = self._length(rollout.index, len(rollout))
        if n == len(rollout):
            return rollout
        return Rollout(
            rollout.prompt, rollout.index, rollout.tokens[:n], rollout.logprobs[:n], rollout.topk_ids[:n],
            rollout.topk_logprobs[:n], rollout.end_reason, rollout.weight_version,
        )  # fmt: skip

    def _length(self, index: int, total: int) -> int:
        """At least one token stays: an answer may be spent at its first position."""
        if not bool(self.state.spent[index]):
            return total
        return max(1, int(self.state.effective_length[index]))
